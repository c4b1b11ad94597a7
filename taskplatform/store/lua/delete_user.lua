-- Deletes a user: subscriptions, waiting and finished jobs, histories. What runs is canceled and forgotten soon after.
-- ARGV[1] now   ARGV[2] user   ARGV[3] actor   ARGV[4] size of the change log
-- Returns {jobs canceled, subscriptions removed}, or {-1, 0} when there is no such user.

local now, user = clock(ARGV[1]), ARGV[2]
local key = K.user .. user
local fields = pairs_to_table(call('HGETALL', key))
if not fields['@created'] then return { -1, 0 } end
local subscriptions, canceled, ids = 0, 0, call('ZRANGE', K.user_jobs .. user, 0, -1)
for definition, raw in pairs(fields) do
  if string.sub(definition, 1, 1) ~= '@' then
    local readable, subscription = pcall(cjson.decode, raw)
    leave_groups(user, definition, readable and subscription or {})
    subscriptions = subscriptions + 1
    for _, id in ipairs(packed_jobs(user, definition)) do ids[#ids + 1] = id end
  end
end
for _, id in ipairs(ids) do
  local job = load_job(id)
  if job then
    if ALLOWED[job.state].canceled then
      canceled = canceled + 1
      if job.state == 'running' then tell_to_stop(job.worker, id, job.delivery, '') end
      conclude(id, job, 'canceled', now, '', 'user deleted', '')
    end
    forget_job(id)
  end
end
call('DEL', key, K.held .. user, K.user_jobs .. user, K.trail .. user, K.gone .. user)
call('SREM', K.capped_users, user)
set_limit('user:' .. user, K.limits_live, '', now)
call('ZREM', K.users, user)
log_change(now, ARGV[4], ARGV[3], 'user deleted', user, canceled .. ' jobs canceled, ' .. subscriptions .. ' subscriptions removed')
release(now, 100)
return { canceled, subscriptions }
