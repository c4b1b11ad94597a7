-- The process that ran a delivery died, and its worker lives to say so; or the delivery is stuck, and its worker gives it up.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker   ARGV[5] what happened
-- ARGV[6] losses after which a job fails for good   ARGV[7] wait before the next run in ms, doubled by each further loss
-- ARGV[8] 1: it is stuck, and the worker shall stop it
-- Returns 1, or 0 when the delivery no longer counts.

local now, id, delivery, worker = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load_job(id)
if not job or not (is_run(job, delivery, worker) or (job.state == 'queued' and job.delivery == delivery)) then return 0 end
even_when_full()
lose(id, job, now, worker, ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]))
if ARGV[8] == '1' then
  tell_to_stop(worker, id, delivery, 'it was ' .. ARGV[5])
  count('stuck')
end
release(now, 10)
return 1
