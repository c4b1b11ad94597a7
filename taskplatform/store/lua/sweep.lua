-- Forgets what is past its retention: finished jobs, dead letters, occurrences, keys of triggers, backfills.
-- ARGV[1] now   ARGV[2] retention in ms   ARGV[3] retention of dead letters in ms   ARGV[4] most dead letters, the oldest go first
-- ARGV[5] most of each in one go
-- Returns how many were forgotten.

local now, most_dead, most = clock(ARGV[1]), tonumber(ARGV[4]), tonumber(ARGV[5])
local before = text(now - tonumber(ARGV[2]))
local jobs = call('ZRANGEBYSCORE', K.finished, '-inf', before, 'LIMIT', 0, most)
for _, id in ipairs(jobs) do forget_job(id) end

local function forget_dead(id, what)
  local job = load_job(id)
  forget_job(id)
  if job then trail.gone(id, job, now, what) end
end

local dead = call('ZRANGEBYSCORE', K.dead, '-inf', text(now - tonumber(ARGV[3])), 'LIMIT', 0, most)
for _, id in ipairs(dead) do forget_dead(id, 'dropped at the end of the setting dead_retention') end
local over = math.min(call('ZCARD', K.dead) - most_dead, most - #dead)
local too_many = over > 0 and call('ZRANGE', K.dead, 0, over - 1) or {}
for _, id in ipairs(too_many) do forget_dead(id, 'dropped, because more than dead_max dead letters were kept') end
if #too_many > 0 then count('dead_letters_dropped', #too_many) end

local occurrences = call('ZRANGEBYSCORE', K.closed, '-inf', before, 'LIMIT', 0, most)
for _, oid in ipairs(occurrences) do
  local values = call('HMGET', K.occurrence .. oid, 'definition', 'group')
  if values[1] then call('ZREM', K.occurrences .. values[1], oid) end
  if values[2] then call('ZREM', K.skipped .. values[2], oid) end
  call('DEL', K.occurrence .. oid)
  call('ZREM', K.closed, oid)
end
local keys = call('ZRANGEBYSCORE', K.triggers, '-inf', before, 'LIMIT', 0, most)
for _, one in ipairs(keys) do call('ZREM', K.triggers, one) end
local ended = call('ZRANGEBYSCORE', K.backfills_ended, '-inf', before, 'LIMIT', 0, most)
for _, id in ipairs(ended) do
  call('DEL', K.backfill .. id, K.backfill_jobs .. id)
  call('ZREM', K.backfills, id)
  call('ZREM', K.backfills_ended, id)
end
return #jobs + #dead + #too_many + #occurrences + #keys + #ended
