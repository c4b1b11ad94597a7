-- A worker has done what it can about a run that it was to stop.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] job id   ARGV[4] delivery   ARGV[5] what the history is to say of it ('' nothing)
-- ARGV[6] 1: with that the run is over, and no result of it will come to be discarded
-- Returns 1, or 0 when that was said before.

local now, worker, id, delivery, words = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if call('HDEL', K.stops .. worker, id .. '#' .. delivery) == 0 then return 0 end
local job = words ~= '' and load_job(id)
if job then add_note(id, now, job, worker, words, '') end
if ARGV[6] == '1' then count('discarded') end
return 1
