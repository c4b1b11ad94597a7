-- A worker that stops gives back deliveries that it holds, to their old places: those that have not started, or also those whose runs
-- were broken off. A delivery that is given back does not start any more.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] '1': also those that run   ARGV[4…] deliveries, each as <job id>#<delivery>
-- Returns how many jobs were given back.

local now, worker, also_running = clock(ARGV[1]), ARGV[2], ARGV[3] == '1'
local given = 0
even_when_full()
for i = 4, #ARGV do
  local id, job = held_job(ARGV[i])
  if job then given = given + hand_back(id, job, now, worker, also_running) end
end
if given > 0 then release(now, 100) end
return given
