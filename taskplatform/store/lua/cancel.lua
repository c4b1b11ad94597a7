-- Cancels a job that is not finished. One that runs is taken from its worker, which is told to stop it.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] reason   ARGV[4] only this delivery ('' the job, however it is)
-- Returns the state that the job was in, or 'unknown'.

local now, id, reason = clock(ARGV[1]), ARGV[2], ARGV[3]
local job = load_job(id)
if not job then return 'unknown' end
local before = job.state
-- a job that was canceled and retried since has another run coming
if ARGV[4] ~= '' and (tonumber(ARGV[4]) ~= job.delivery or before == 'pending' or before == 'retrying') then return before end
if not (ALLOWED[before] and ALLOWED[before].canceled) then return before end
even_when_full()
if before == 'running' then tell_to_stop(job.worker, id, job.delivery, '') end
conclude(id, job, 'canceled', now, before == 'running' and job.worker or '', reason, '')
release(now, 10)
return before
