-- A worker stops: what it still runs is given back at once, to its old place, and no loss is counted; and what it holds and has not started.
-- ARGV[1] now   ARGV[2] worker   ARGV[3…] deliveries that it holds, each as <job id>#<delivery>
-- Returns how many jobs were given back.

local now, worker = clock(ARGV[1]), ARGV[2]
even_when_full()
local given = 0
for _, id in ipairs(call('SMEMBERS', K.worker_jobs .. worker)) do
  local job = load_job(id)
  if job then given = given + hand_back(id, job, now, worker, true) end
end
for i = 3, #ARGV do
  local id, job = held_job(ARGV[i])
  if job then given = given + hand_back(id, job, now, worker, true) end
end
forget_worker(worker)
call('DEL', K.stops .. worker)
release(now, 100)
return given
