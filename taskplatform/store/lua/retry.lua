-- Runs a job again that ended without success, with a fresh budget of retries.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] reason
-- Returns the state that the job was in, or 'unknown'.

local now, id = clock(ARGV[1]), ARGV[2]
local job = load_job(id)
if not job then return 'unknown' end
local before = job.state
if not (ALLOWED[before] and ALLOWED[before].pending) or not job.finished then return before end
move(id, before, 'pending', now, job.attempt, '', ARGV[3], '')
local seq = call('INCR', K.seq)
call('HSET', K.job .. id, 'after', text(now), 'seq', seq, 'budget', job.attempt, 'losses', 0)
call('HDEL', K.job .. id, 'finished', 'refusals')
call('ZREM', K.finished, id)
count_unfinished(id, 1)
job.state = 'pending'
follow_definition(id, job, now)
wait(id, job.priority, now, seq)
release(now, 10)
return before
