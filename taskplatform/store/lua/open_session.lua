-- Lets a browser in for a time, under an API key that it showed. Of those of a key the oldest go where there are too many.
-- ARGV[1] now   ARGV[2] id of the key   ARGV[3] digest of what the browser shows from now on   ARGV[4] lifetime in ms
-- ARGV[5] most sessions of a key
-- Returns 1.

local now, id, digest, lifetime = clock(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local sessions = K.sessions .. id
-- sent again because its answer was lost: it lasts as long as it was told first
if call('ZSCORE', sessions, digest) then return 1 end
call('ZREMRANGEBYSCORE', sessions, '-inf', now)
call('ZADD', sessions, now + lifetime, digest)
local beyond = call('ZCARD', sessions) - tonumber(ARGV[5])
if beyond > 0 then
  for _, oldest in ipairs(call('ZRANGE', sessions, 0, beyond - 1)) do call('ZREM', sessions, oldest) end
end
call('PEXPIRE', sessions, lifetime)
return 1
