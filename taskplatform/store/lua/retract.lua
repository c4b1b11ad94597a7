-- Removes a definition that is no longer in the catalogue. What waits of it is rejected when its turn comes.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] actor   ARGV[4] size of the change log
-- ARGV[5] the term of the leader that says so ('' whoever it is)
-- Returns 1, 0 when it was not published, -1 when another leads by now.

local now, definition = clock(ARGV[1]), ARGV[2]
if not leads(ARGV[5]) then return -1 end
if call('SREM', K.definitions, definition) == 0 then return 0 end
for _, priority in ipairs(PRIORITIES) do unblock_lane(priority, definition) end
local host = host_of(definition)
call('DEL', K.definition .. definition, K.stats .. definition)
call('SREM', K.unannounced, definition)
call('HDEL', K.following, definition)
hosts_read[definition] = nil
set_limit('definition:' .. definition, K.limits_configured, '', now)
recount(now)
drop_probe(host, definition)
if host ~= '' then wake_host(host) end
trail.add(K.definition_trails, definition, now, false, true, { k = 'retracted', b = ARGV[3] })
log_change(now, ARGV[4], ARGV[3], 'definition removed', definition, '')
return 1
