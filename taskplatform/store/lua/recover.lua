-- Takes its jobs from a worker that was seen to be lost, and forgets the worker; unless it has said since that it lives. What it
-- runs all the same it shall stop, should it come back.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] its last heartbeat, as it was seen   ARGV[4] how it was lost
-- ARGV[5] losses after which a job fails for good   ARGV[6] wait before a lost job's next run in ms, doubled by each further loss
-- ARGV[7] most jobs in one go
-- Returns what was taken, as {'job', id}, and {'worker', worker} when that was all.

local now, worker, how, most_losses, backoff, most = clock(ARGV[1]), ARGV[2], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
if tonumber(call('ZSCORE', K.workers, worker) or '-1') ~= tonumber(ARGV[3]) then return {} end
even_when_full()
local done = {}
for _, id in ipairs(call('SMEMBERS', K.worker_jobs .. worker)) do
  if #done >= most then break end
  local job = load_job(id)
  if not job or job.state ~= 'running' or job.worker ~= worker then
    call('SREM', K.worker_jobs .. worker, id)
  else
    lose(id, job, now, worker, 'worker ' .. worker .. ' lost: ' .. how, most_losses, backoff)
    tell_to_stop(worker, id, job.delivery, 'worker ' .. worker .. ' had been declared lost')
    count('jobs_recovered')
    done[#done + 1] = { 'job', id }
  end
end
if call('EXISTS', K.worker_jobs .. worker) == 0 then
  forget_worker(worker)
  count('workers_lost')
  done[#done + 1] = { 'worker', worker }
end
release(now, 100)
return done
