-- Sets how jobs are released: with turns for the users, and with which share for the lower priorities; and how long changes are told.
-- ARGV[1] now   ARGV[2] fairness: 1 or 0   ARGV[3] share, 0 none   ARGV[4] how many jobs to move at the most
-- ARGV[5] the term of the leader that says so ('' whoever it is)
-- ARGV[6] retention in ms ('' as it is)
-- Returns how many jobs went back from their turns into their lanes; as many as ARGV[4]: there may be more. -1 when another leads by now.

local now, fair, most, moved = clock(ARGV[1]), ARGV[2] == '1', tonumber(ARGV[4]), 0
if not leads(ARGV[5]) then return -1 end
call('HSET', K.options, 'share', ARGV[3])
if ARGV[6] ~= '' then call('HSET', K.options, 'retention', ARGV[6]) end
local switched = fair ~= (option('fairness') ~= nil)
for _, priority in ipairs(switched and PRIORITIES or {}) do
  -- out of the line of its host: the places there are of the other stage
  for _, definition in ipairs(call('ZRANGE', K.blocked .. priority, 0, -1)) do unblock_unless_paused(definition) end
end
if fair then call('HSET', K.options, 'fairness', 1) else call('HDEL', K.options, 'fairness') end
settings_read = nil
for _, priority in ipairs(PRIORITIES) do
  local definitions = {}
  for _, index in ipairs({ K.ready, K.turns, K.blocked }) do
    for _, definition in ipairs(call('ZRANGE', index .. priority, 0, -1)) do definitions[#definitions + 1] = definition end
  end
  for _, definition in ipairs(definitions) do
    local key = K.turn .. priority .. ':' .. definition
    for _, member in ipairs(not fair and moved < most and call('ZRANGE', key, 0, most - moved - 1) or {}) do
      call('ZREM', key, member)
      call('ZADD', K.lane .. priority .. ':' .. definition, load_job(string.sub(member, 13)).after, member)
      moved = moved + 1
    end
    if not fair then show(TURNS, priority, definition, head_of(TURNS, priority, definition)[2]) end
    if switched or moved > 0 then lane_changed(priority, definition) end
    -- with fairness the lanes that are blocked are shown too
    if not fair and call('ZSCORE', K.blocked .. priority, definition) then show(WAITING, priority, definition, nil) end
  end
  if not fair and call('ZCARD', K.turns .. priority) == 0 then
    call('DEL', K.rounds .. priority)
    call('HDEL', K.round, priority)
  end
end
release(now, 100)
return moved
