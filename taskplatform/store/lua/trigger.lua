-- Opens an extra occurrence of a definition, now, for all its subscribers whatever their schedules.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] the window that was asked for, in ms   ARGV[4] actor   ARGV[5] size of the change log
-- ARGV[6] its time, from the caller, so that a call that is sent again because its answer was lost is the same occurrence
-- ARGV[7] its window in ms   ARGV[8] how many ms after its time that begins   ARGV[9] why, if it is not what was asked for
-- ARGV[10] a key of the caller's ('' none): with the same one it is the same occurrence
-- Returns {time, subscribers}, or {-1, 0} when the definition is not published.

local now, definition, asked, window, delay = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[7], tonumber(ARGV[8])
if call('SISMEMBER', K.definitions, definition) == 0 then return { -1, 0 } end
local subscribers = tonumber(call('HGET', K.subscribers, definition) or '0')
local at, opened = ARGV[6], 0
if ARGV[10] ~= '' and call('ZADD', K.triggers, 'NX', at, definition .. ':' .. ARGV[10]) == 0 then
  return { tonumber(call('ZSCORE', K.triggers, definition .. ':' .. ARGV[10])), subscribers }
end
local base, reason = text(tonumber(at) + delay), 'triggered by ' .. ARGV[4] .. (ARGV[9] ~= '' and '; ' .. ARGV[9] or '')
for _, gid in ipairs(call('SMEMBERS', K.groups .. definition)) do
  local oid = gid .. '|t' .. at
  if call('EXISTS', K.occurrence .. oid) == 0 then
    opened = opened + 1
    call('HSET', K.occurrence .. oid, 'definition', definition, 'group', gid, 'at', at, 'last', at, 'base', base, 'window', window,
      'asked', asked, 'cursor', '-1', 'suffix', 't' .. at, 'source', 'trigger', 'state', 'open', 'reason', reason, 'opened', text(now))
    call('ZADD', K.occurrences .. definition, at, oid)
    open_occurrence(oid, gid, at, base, window, window - asked + delay)
  end
end
if opened > 0 then
  local span = trail.span()
  call('ZADD', K.triggered .. definition, at, at)
  call('ZREMRANGEBYSCORE', K.triggered .. definition, '-inf', text(now - span))
  call('PEXPIRE', K.triggered .. definition, text(span))
end
if opened > 0 then log_change(now, ARGV[5], ARGV[4], 'trigger', definition, '') end
return { tonumber(at), subscribers }
