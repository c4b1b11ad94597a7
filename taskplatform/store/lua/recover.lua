-- Takes the jobs of lost workers from them, and forgets the workers.
-- ARGV[1] now   ARGV[2] silence in ms after which a worker is lost   ARGV[3] losses after which a job fails for good
-- ARGV[4] wait before a lost job's next run in ms, doubled by each further loss   ARGV[5] most jobs in one go
-- Returns what was taken, as {'job', id} and {'worker', worker}.

local now, silence, most_losses, backoff, most = clock(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
even_when_full()
local done = {}
for _, worker in ipairs(call('ZRANGEBYSCORE', K.workers, '-inf', '(' .. text(now - silence))) do
  for _, id in ipairs(call('SMEMBERS', K.worker_jobs .. worker)) do
    if #done >= most then return done end
    local job = load_job(id)
    if not job or job.state ~= 'running' or job.worker ~= worker then
      call('SREM', K.worker_jobs .. worker, id)
    else
      lose(id, job, now, worker, 'worker ' .. worker .. ' lost', most_losses, backoff)
      done[#done + 1] = { 'job', id }
    end
  end
  forget_worker(worker)
  done[#done + 1] = { 'worker', worker }
end
if #done > 0 then release(now, 100) end
return done
