-- Makes jobs by hand: all of the batch, or none where one is not acceptable. A job whose id exists stays as it is.
-- ARGV[1] now   ARGV[2…] by fives: job id, priority ('' the definition's), execute_after in ms (with a leading + from now;
-- what has passed is now), params as JSON, source
-- Returns {0, made, …} with a 1 for each that was made and a 0 for each that existed, {-1, i} when job i's user does not
-- exist, {-2, i} when its definition is not published.

local now = clock(ARGV[1])
for i = 2, #ARGV, 5 do
  local definition, user = parts(ARGV[i])
  if call('EXISTS', K.user .. user) == 0 then return { -1, (i - 2) / 5 } end
  if call('EXISTS', K.definition .. definition) == 0 then return { -2, (i - 2) / 5 } end
end
local answer = { 0, 0 }
for i = 2, #ARGV, 5 do
  local id, priority, after, params, source = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local definition, user = parts(id)
  if load_job(id) then
    answer[#answer + 1] = 0
  else
    local own = priority ~= ''
    if not own then priority = call('HGET', K.definition .. definition, 'priority') end
    local delay = tonumber(string.match(after, '^%+(.*)$'))
    after = text(math.max(now, delay and now + delay or tonumber(after)))
    local seq = call('INCR', K.seq)
    create(id, user, now, priority, after, seq, source, params)
    -- a change of the definition's priority leaves it as it is
    if own then call('HSET', K.job .. id, 'own', 1) end
    call('HINCRBY', K.counts, 'pending', 1)
    call('ZADD', K.definition_jobs .. definition, text(now), id)
    count_unfinished(id, 1)
    wait(id, priority, tonumber(after), seq)
    if delay and delay > 0 then note_delay(id, now) end
    answer[2] = answer[2] + 1
    answer[#answer + 1] = 1
  end
end
release(now, 100)
return answer
