-- Cancels a backfill: it makes nothing more, and what waits of it is canceled. What runs goes on. The planner goes on with it, should
-- the caller not.
-- ARGV[1] now   ARGV[2] backfill   ARGV[3] actor ('' goes on with what somebody began)   ARGV[4] size of the change log
-- ARGV[5] most jobs in one go
-- Returns {the state that it is in, jobs canceled}: 'canceling' while there is more to cancel. The state is 'unknown' where there is no
-- such backfill, and another one where it ended before, and nothing of it was left.

local now, id, actor, most, canceled = clock(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[5]), 0
local key = K.backfill .. id
local values = call('HMGET', key, 'state', 'definition', 'reason')
local state, definition, reason = values[1], values[2], values[3]
if not state then
  call('ZREM', K.due, 'b|' .. id)
  return { 'unknown', 0 }
end
if state ~= 'canceling' then
  local ended = state ~= 'running' and state ~= 'paused'
  if actor == '' or state == 'canceled' or (ended and call('ZCARD', K.backfill_jobs .. id) == 0) then return { state, 0 } end
  even_when_full()
  reason = 'canceled by ' .. actor
  call('ZREM', K.backfills_ended, id)
  call('HSET', key, 'state', 'canceling', 'reason', reason)
  call('ZADD', K.due, text(now), 'b|' .. id)
  log_change(now, ARGV[4], actor, 'backfill', definition, id .. ' canceled')
end
even_when_full()
for _, job_id in ipairs(call('ZRANGE', K.backfill_jobs .. id, 0, -1)) do
  local job = load_job(job_id)
  if not job then
    call('ZREM', K.backfill_jobs .. id, job_id)
  elseif job.state ~= 'running' and ALLOWED[job.state].canceled then
    if canceled == most then return { 'canceling', canceled } end
    conclude(job_id, job, 'canceled', now, '', 'backfill ' .. id .. ' ' .. reason, '')
    canceled = canceled + 1
  end
end
backfills.close(id, 'canceled', reason, now)
if canceled > 0 then release(now, 10) end
return { 'canceled', canceled }
