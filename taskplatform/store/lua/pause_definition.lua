-- Pauses a definition: nothing of it is planned or released; or resumes it.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] why ('' resumes)   ARGV[4] actor   ARGV[5] size of the change log
-- Returns 1 when that changed something, 0 when it was so already, -1 when it is not published.

local now, definition, why = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = K.definition .. definition
if call('EXISTS', key) == 0 then return -1 end
local paused = call('HGET', key, 'paused')
if why ~= '' then
  if paused then return 0 end
  call('HSET', key, 'paused', why)
  for _, priority in ipairs(PRIORITIES) do block_lane(priority, definition, PAUSED) end
else
  if not paused then return 0 end
  call('HDEL', key, 'paused')
  for _, priority in ipairs(PRIORITIES) do unblock_lane(priority, definition) end
  release(now, 100)
end
trail.add(K.definition_trails, definition, now, why ~= '', true, { k = why ~= '' and 'paused' or 'resumed', b = ARGV[4], w = why ~= '' and why or nil })
log_change(now, ARGV[5], ARGV[4], why ~= '' and 'definition paused' or 'definition resumed', definition, why)
return 1
