-- Notes that an API key was used.
-- ARGV[1] now   ARGV[2] id
-- Returns 1, or 0 when there is no such key.

local now, id = clock(ARGV[1]), ARGV[2]
even_when_full()
if call('EXISTS', K.api_key .. id) == 0 then return 0 end
call('HSET', K.api_key .. id, 'used', text(now))
return 1
