-- A worker cannot take a delivery and gives it back for others, as in a rolling deployment that it is not yet part of. No attempt is
-- counted. What nobody takes for long is rejected.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker   ARGV[5] why
-- ARGV[6] wait before the next release in ms, after the n-th time n times as long   ARGV[7] how often before it is rejected
-- Returns 'given back', 'rejected', the job's state when this delivery no longer counts, or 'unknown'.

local now, id, delivery, worker, why = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local job = load_job(id)
if not job then return 'unknown' end
if job.state ~= 'queued' or job.delivery ~= delivery then return job.state end
local refusals = tonumber(job.refusals or '0') + 1
local answer = 'given back'
if call('EXISTS', K.definition .. parts(id)) == 0 then
  conclude(id, job, 'rejected', now, worker, 'definition ' .. parts(id) .. ' does not exist any more', '')
  answer = 'rejected'
elseif refusals >= tonumber(ARGV[7]) then
  conclude(id, job, 'rejected', now, worker, why .. '; given back ' .. refusals .. ' times', '')
  answer = 'rejected'
else
  give_back(id, job, job.attempt > 0 and 'retrying' or 'pending', now, now + tonumber(ARGV[6]) * refusals, worker, why .. ': given back', '')
end
call('HSET', K.job .. id, 'refusals', refusals)
count('refused')
release(now, 10)
return answer
