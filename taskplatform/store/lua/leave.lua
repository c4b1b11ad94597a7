-- A worker stops: what it still runs is given back at once, to its old place, and no loss is counted.
-- ARGV[1] now   ARGV[2] worker
-- Returns how many jobs were given back.

local now, worker = clock(ARGV[1]), ARGV[2]
even_when_full()
local given = 0
for _, id in ipairs(call('SMEMBERS', K.worker_jobs .. worker)) do
  local job = load_job(id)
  if job and job.state == 'running' and job.worker == worker then
    give_back(id, job, 'retrying', now, tonumber(job.after), worker, 'worker ' .. worker .. ' stopped', '')
    -- the run that was broken off does not use up the job's budget
    call('HSET', K.job .. id, 'budget', tonumber(job.budget or '0') + 1)
    given = given + 1
  end
end
forget_worker(worker)
release(now, 100)
return given
