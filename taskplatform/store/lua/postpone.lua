-- Puts off a group or an occurrence that the planner cannot handle; another planner, with another catalogue, may be able to.
-- A group whose definition is not published is not looked at again until it is.
-- ARGV[1] now   ARGV[2] 'g|<gid>', 'o|<oid>' or 'b|<backfill>'   ARGV[3] for how long, in ms
-- Returns 1 when it was put off, 0 when it was dropped.

local now, member = clock(ARGV[1]), ARGV[2]
local gid = string.match(member, '^g|(.*)$')
if gid then
  local definition = call('HGET', K.group .. gid, 'definition')
  if not definition or call('SISMEMBER', K.definitions, definition) == 0 then
    call('ZREM', K.due, member)
    return 0
  end
end
call('ZADD', K.due, 'XX', text(now + tonumber(ARGV[3])), member)
return 1
