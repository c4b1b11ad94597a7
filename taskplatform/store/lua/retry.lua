-- Runs jobs again that ended without success, each with a fresh budget of retries and losses.
-- ARGV[1] now   ARGV[2] reason   ARGV[3] 1: only dead letters   ARGV[4] a mark of this call
-- ARGV[5…] job ids
-- Returns for each the state that it was in, 'unknown', 'removed' when its definition is, or 'not dead'. One that was retried by hand already and
-- runs or waits since, or has completed, or one that this same call retried, is answered as the first time and stays as it is.

local now, reason, only_dead, mark = clock(ARGV[1]), ARGV[2], ARGV[3] == '1', ARGV[4]

local function retry(id)
  local job = load_job(id)
  if not job then return 'unknown' end
  local before = job.state
  local repeated, first = string.match(job.retried or '', '^(%S+) (%S+)$')
  if repeated and (repeated == mark or not (ALLOWED[before] and ALLOWED[before].pending) or not job.finished) then return first end
  if only_dead and not job.died then return 'not dead' end
  if not (ALLOWED[before] and ALLOWED[before].pending) or not job.finished then return before end
  local definition = parts(id)
  if call('EXISTS', K.definition .. definition) == 0 then return 'removed' end
  move(id, before, 'pending', now, job.attempt, '', reason, '')
  local seq = call('INCR', K.seq)
  call('HSET', K.job .. id, 'after', text(now), 'seq', seq, 'budget', job.attempt, 'losses', 0, 'retried', mark .. ' ' .. before)
  call('HDEL', K.job .. id, 'finished', 'died', 'refusals')
  call('ZREM', K.finished, id)
  call('ZREM', K.dead, id)
  count_unfinished(id, 1)
  if job.backfill then backfills.count(id, job, before, -1) end
  job.state = 'pending'
  follow_definition(id, job, now)
  wait(id, job.priority, now, seq)
  return before
end

local answers = {}
for i = 5, #ARGV do answers[#answers + 1] = retry(ARGV[i]) end
release(now, 100)
return answers
