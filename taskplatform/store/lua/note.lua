-- Adds a line to a job's history that changes nothing, unless it is the last one already.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] worker   ARGV[4] text
-- Returns 1, or 0 when there is no such job.

local now, id = clock(ARGV[1]), ARGV[2]
local job = load_job(id)
if not job then return 0 end
add_note(id, now, job, ARGV[3], ARGV[4], '')
return 1
