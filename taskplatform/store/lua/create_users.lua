-- Creates many users; those that exist stay as they are.
-- ARGV[1] now   ARGV[2…] users
-- Returns how many were new.

local now, made = clock(ARGV[1]), 0
for i = 2, #ARGV do
  if call('HSETNX', K.user .. ARGV[i], '@created', text(now)) == 1 then
    call('ZADD', K.users, 0, ARGV[i])
    made = made + 1
  end
end
return made
