-- Tells the scripts of a definition, and gives its default group its schedule.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] schedule of the default group   ARGV[4] 1: only if it is not published yet
-- ARGV[5] actor   ARGV[6] size of the change log   ARGV[7] the term of the leader that says so ('' whoever it is)
-- ARGV[8] its limit ('' none)   ARGV[9] the host that it calls ('' none, 'keep' not known here)
-- ARGV[10…] by twos: fields and their values ('' removes the field)
-- A definition that is new is noted for `announce`, and one whose waiting jobs must follow to another priority for `follow`: both are
-- then done also when who publishes dies.
-- Returns 1 when something changed, 0 when not, -1 when another leads by now.

local now, definition, schedule = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = K.definition .. definition
if not leads(ARGV[7]) then return -1 end
local is_new = call('SADD', K.definitions, definition) == 1
if not is_new and ARGV[4] == '1' then return 0 end
local changed = {}
for i = 10, #ARGV, 2 do
  local field, value = ARGV[i], ARGV[i + 1]
  local before = call('HGET', key, field) or ''
  if before ~= value then
    if field ~= 'version' then
      changed[#changed + 1] = field
    elseif before ~= '' then
      changed[#changed + 1] = 'version ' .. before .. ' -> ' .. value
    end
    if field == 'priority' and before ~= '' then call('HSET', K.following, definition, value) end
    if value == '' then call('HDEL', key, field) else call('HSET', key, field, value) end
  end
end
if ARGV[9] ~= 'keep' and ARGV[9] ~= host_of(definition) then
  local old = host_of(definition)
  if old ~= '' then changed[#changed + 1] = 'host' end
  -- out of the line of the old host, and out of its counts
  unblock_unless_paused(definition)
  call('HSET', key, 'host', ARGV[9])
  hosts_read[definition] = nil
  recount(now)
  drop_probe(old, definition)
  if old ~= '' then wake_host(old) end
end
if set_limit('definition:' .. definition, K.limits_configured, ARGV[8], now) == 1 then changed[#changed + 1] = 'limit' end
local group_key = K.group .. definition
local told = call('HGET', key, 'schedule')
if told ~= schedule then
  changed[#changed + 1] = 'schedule'
  call('HSET', key, 'schedule', schedule)
end
local planned_by, cursor = call('HGET', group_key, 'schedule') or told or schedule, now
if is_new then trail.follow_up(K.definition_trails, definition, now, true, { k = 'published', b = ARGV[5] }) end
if call('EXISTS', group_key) == 1 and call('HGET', group_key, 'schedule') ~= schedule then
  -- the planner has done what the old schedule made due; the new one counts from now
  cursor = math.max(now, tonumber(call('HGET', group_key, 'cursor')))
  call('HSET', group_key, 'schedule', schedule, 'cursor', text(cursor))
  call('ZADD', K.due, text(now), 'g|' .. definition)
end
if planned_by ~= schedule then
  local paused = call('HEXISTS', key, 'paused') == 1
  trail.add(K.definition_trails, definition, now, paused, true, { k = 'schedule', b = ARGV[5], c = planned_by, f = cursor })
end
if is_new then
  call('SADD', K.unannounced, definition)
  for _, gid in ipairs(call('SMEMBERS', K.groups .. definition)) do call('ZADD', K.due, text(now), 'g|' .. gid) end
end
if #changed == 0 then return 0 end
-- `announce` tells of the new ones, of all in one
if not is_new then log_change(now, ARGV[6], ARGV[5], 'definition changed', definition, table.concat(changed, ', ')) end
return 1
