-- Pauses a backfill: it makes nothing more until it is resumed; or resumes it. What it made goes on.
-- ARGV[1] now   ARGV[2] backfill   ARGV[3] 1 pauses, 0 resumes   ARGV[4] actor   ARGV[5] size of the change log
-- Returns {1 when that changed something or 0, the state that it is in}; the state is 'unknown' where there is no such backfill.

local now, id, pause, actor = clock(ARGV[1]), ARGV[2], ARGV[3] == '1', ARGV[4]
local key = K.backfill .. id
local values = call('HMGET', key, 'state', 'definition')
local state, definition = values[1], values[2]
if not state then return { 0, 'unknown' } end
if pause and state == 'running' then
  state = 'paused'
  call('HSET', key, 'state', state, 'reason', 'paused by ' .. actor)
  call('HDEL', key, 'held', 'waits_for')
  call('ZREM', K.due, 'b|' .. id)
elseif not pause and state == 'paused' then
  state = 'running'
  call('HSET', key, 'state', state, 'reason', '')
  call('ZADD', K.due, text(now), 'b|' .. id)
else
  return { 0, state }
end
log_change(now, ARGV[5], actor, 'backfill', definition, id .. (pause and ' paused' or ' resumed'))
return { 1, state }
