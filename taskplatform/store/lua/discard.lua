-- Forgets dead letters now, with their histories, and says so in the change log.
-- ARGV[1] now   ARGV[2] actor   ARGV[3] size of the change log   ARGV[4] subject, for the change log   ARGV[5] detail
-- ARGV[6…] job ids
-- Returns for each 'discarded', 'unknown', or 'not dead' for a job that stays as it is.

local now, answers, discarded = clock(ARGV[1]), {}, 0
for i = 6, #ARGV do
  local id = ARGV[i]
  local job = load_job(id)
  if job and job.died then
    forget_job(id)
    trail.gone(id, job, now, 'discarded by ' .. ARGV[2])
    discarded = discarded + 1
  end
  answers[#answers + 1] = not job and 'unknown' or job.died and 'discarded' or 'not dead'
end
if discarded > 0 then
  local many = discarded == 1 and '1 dead letter' or discarded .. ' dead letters'
  log_change(now, ARGV[3], ARGV[2], 'dead letters discarded', ARGV[4], ARGV[5] ~= '' and many .. ', ' .. ARGV[5] or many)
end
return answers
