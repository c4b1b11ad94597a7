-- Counts an attempt to come in that failed, and tells the audit log of it while its source has attempts left.
-- A source has a number of attempts, and gets one back each time a span has passed. How many it made beyond is told with its next
-- line, or when it has them all back.
-- ARGV[1] now   ARGV[2] source: an address, and perhaps a word   ARGV[3] span in ms   ARGV[4] attempts   ARGV[5] most sources that are known
-- ARGV[6] size of the audit log   ARGV[7] address   ARGV[8] name of the key whose secret it was ('' none)   ARGV[9] its id
-- ARGV[10] what was asked for   ARGV[11] why it was refused   ARGV[12] id of the request
-- Returns 0, or for how many ms the source has no attempt.

local now, source, span, attempts, size = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[6]
even_when_full()

-- The score is when a source has all its attempts back. Such a one need not be known any more; where there are too many, the nearest
-- to that are let off.
local gone = call('ZRANGEBYSCORE', K.attempts, '-inf', text(now), 'LIMIT', 0, 100)
local over = call('ZCARD', K.attempts) - #gone - tonumber(ARGV[5])
if over >= 0 then
  for _, one in ipairs(call('ZRANGE', K.attempts, #gone, #gone + over)) do gone[#gone + 1] = one end
end
for _, one in ipairs(gone) do
  if one ~= source then
    local beyond = call('HGET', K.attempts_beyond, one)
    if beyond then
      audit(now, 'refused', size, 'address', string.match(one, '^%S+'), 'about', beyond .. ' more attempts before this')
      call('HDEL', K.attempts_beyond, one)
    end
    call('ZREM', K.attempts, one)
  end
end

local full = math.max(now, tonumber(call('ZSCORE', K.attempts, source) or '0'))
local wait = full + span - attempts * span - now
if wait > 0 then
  call('HINCRBY', K.attempts_beyond, source, 1)
  return math.ceil(wait)
end
call('ZADD', K.attempts, full + span, source)
local why, beyond = ARGV[11], call('HGET', K.attempts_beyond, source)
if beyond then
  why = why .. '; ' .. beyond .. ' more attempts before this'
  call('HDEL', K.attempts_beyond, source)
end
audit(now, 'refused', size, 'address', ARGV[7], 'key', ARGV[8], 'id', ARGV[9], 'action', ARGV[10], 'about', why, 'request', ARGV[12])
return 0
