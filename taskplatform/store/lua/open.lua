-- Moves a group's cursor over the occurrences that came due, opening or skipping each: all or nothing.
-- ARGV[1] now   ARGV[2] <gid>   ARGV[3] the cursor that the planner saw   ARGV[4] the new cursor
-- ARGV[5] when to look at the group again ('' never)   ARGV[6] the definition's window in ms   ARGV[7] horizon in ms
-- ARGV[8] the schedule that the planner saw
-- ARGV[9…] by sixes: time, last time (for a range that is skipped in one), source or 'skip', reason, window in ms, how many ms
--   later than it would without limits its window begins (for what is caught up: the first one's)
-- Returns how many were opened, or -1 when cursor or schedule are not those that the planner saw, -2 when the group has no members.

local now, gid, seen, cursor, again = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local asked, horizon = ARGV[6], tonumber(ARGV[7])
local group_key = K.group .. gid
local group = call('HMGET', group_key, 'definition', 'cursor', 'schedule')
local definition = group[1]
if not definition then
  call('ZREM', K.due, 'g|' .. gid)
  return -2
end
if drop_empty_group(definition, gid) then return -2 end
if group[2] ~= seen or group[3] ~= ARGV[8] then return -1 end

local paused = call('HGET', K.definition .. definition, 'paused')
local opened, late = 0, 0
for i = 9, #ARGV, 6 do
  local at, last, source, reason, window, delay = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], tonumber(ARGV[i + 5])
  local oid = gid .. '|' .. at
  local okey = K.occurrence .. oid
  if call('EXISTS', okey) == 0 then
    local base = text(tonumber(at) + delay)
    if source == 'catch_up' then
      -- each over a window of its own, one after the other, from now on
      base = text(now + delay + late * tonumber(window))
      late = late + 1
    end
    if source == 'skip' then
      -- one record for all that were missed
      call('HINCRBY', K.planner, 'skipped_missed', string.match(reason, '^%d+') or 1)
    elseif paused then
      call('HINCRBY', K.planner, 'skipped_paused', 1)
      source, reason = 'skip', 'definition paused, ' .. paused
    end
    local state = source == 'skip' and 'skipped' or 'open'
    call('HSET', okey, 'definition', definition, 'group', gid, 'at', at, 'last', last, 'base', base, 'window', window,
      'asked', asked, 'cursor', '-1', 'suffix', at, 'source', source, 'state', state, 'reason', reason, 'opened', text(now))
    if at ~= last then
      -- a record of many is found by the time of the last, and the schedule tells which they are
      call('HSET', okey, 'schedule', ARGV[8])
      call('ZADD', K.skipped .. gid, last, oid)
    end
    call('ZADD', K.occurrences .. definition, at, oid)
    if state == 'open' then
      opened = opened + 1
      open_occurrence(oid, gid, text(tonumber(base) - horizon), base, window, window - asked + delay)
    else
      call('ZADD', K.closed, text(now), oid)
    end
  end
end
call('HSET', group_key, 'cursor', cursor)
if again == '' then
  call('ZREM', K.due, 'g|' .. gid)
else
  call('ZADD', K.due, again, 'g|' .. gid)
end
return opened
