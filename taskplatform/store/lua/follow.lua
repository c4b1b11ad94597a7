-- Gives what waits of a definition the priority that it has by now; what was given one of its own keeps that.
-- ARGV[1] now   ARGV[2] definition   ARGV[3] from which priority   ARGV[4] 1: those that have their turns
-- ARGV[5] how many to pass over   ARGV[6] how many to look at; 0: all that waits has been looked at for priority ARGV[3]
-- Returns {looked at, changed}.

local now, definition, from, changed = clock(ARGV[1]), ARGV[2], ARGV[3], 0
if ARGV[6] == '0' then
  if call('HGET', K.following, definition) == from then call('HDEL', K.following, definition) end
  return { 0, 0 }
end
local stage = ARGV[4] == '1' and TURNS or WAITING
local members = call('ZRANGE', stage.lane .. from .. ':' .. definition, ARGV[5], ARGV[5] + ARGV[6] - 1)
for _, member in ipairs(members) do
  local id = string.sub(member, 13)
  local job = load_job(id)
  if job and job.own ~= '1' then
    unwait(id, job)
    follow_definition(id, job, now)
    wait(id, job.priority, tonumber(job.after), tonumber(job.seq))
    changed = changed + 1
  end
end
return { #members, changed }
