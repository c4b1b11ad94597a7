-- Creates a user.
-- ARGV[1] now   ARGV[2] user   ARGV[3] name   ARGV[4] actor   ARGV[5] size of the change log
-- Returns 1, or 0 when the user exists.

local now, user = clock(ARGV[1]), ARGV[2]
local key = K.user .. user
if call('EXISTS', key) == 1 then return 0 end
call('HSET', key, '@created', text(now))
if ARGV[3] ~= '' then call('HSET', key, '@name', ARGV[3]) end
call('ZADD', K.users, 0, user)
log_change(now, ARGV[5], ARGV[4], 'user created', user, '')
return 1
