-- Forgets jobs and occurrences that ended longer ago than their retention.
-- ARGV[1] now   ARGV[2] retention in ms   ARGV[3] most of each in one go
-- Returns how many jobs and occurrences were forgotten.

local now, retention, most = clock(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local before = text(now - retention)
local jobs = call('ZRANGEBYSCORE', K.finished, '-inf', before, 'LIMIT', 0, most)
for _, id in ipairs(jobs) do forget_job(id) end
local occurrences = call('ZRANGEBYSCORE', K.closed, '-inf', before, 'LIMIT', 0, most)
for _, oid in ipairs(occurrences) do
  local definition = call('HGET', K.occurrence .. oid, 'definition')
  if definition then call('ZREM', K.occurrences .. definition, oid) end
  call('DEL', K.occurrence .. oid)
  call('ZREM', K.closed, oid)
end
return #jobs + #occurrences
