-- Gives a job that waits another priority; it keeps its time, and its place among those of its time.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] priority   ARGV[4] reason
-- Returns the state that the job is in, or 'unknown'. One that does not wait stays as it is.

local now, id, priority = clock(ARGV[1]), ARGV[2], ARGV[3]
local job = load_job(id)
if not job then return 'unknown' end
if (job.state ~= 'pending' and job.state ~= 'retrying') or job.priority == priority then return job.state end
local _, user = parts(id)
local held = call('SISMEMBER', K.held .. user, id) == 1
if not held then unwait(id, job) end
change_priority(id, job, priority, now, ARGV[4])
call('HSET', K.job .. id, 'own', 1)
if not held then wait(id, priority, tonumber(job.after), tonumber(job.seq)) end
release(now, 10)
return job.state
