-- Releases again, under a new delivery, what has been queued for too long and is not in its queue: the message was taken by a
-- process that died before it started the job. If that process lives after all, the new delivery fences it off. A probe of a host that
-- is queued for so long makes room for another.
-- ARGV[1] now   ARGV[2] how long a job may be queued before it is looked at, in ms   ARGV[3] most jobs in one go
-- ARGV[4] 1: the clock was set since the caller's last look
-- Returns their ids.

local now, patience, most = clock(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local found = {}
for _, priority in ipairs(PRIORITIES) do
  -- what was queued by another clock than this one is given its time from now on
  for _, id in ipairs(call('ZRANGEBYSCORE', K.queued .. priority, ARGV[4] == '1' and '-inf' or '(' .. text(now), '+inf')) do
    call('ZADD', K.queued .. priority, text(now), id)
  end
  local suspects = call('ZRANGEBYSCORE', K.queued .. priority, '-inf', text(now - patience), 'LIMIT', 0, most)
  if #suspects > 0 then
    local waiting = {}
    for _, message in ipairs(call('LRANGE', priority, 0, -1)) do
      local tag = string.match(message, '"delivery_tag": "([^"]+)"')
      if tag then waiting[tag] = true end
    end
    for _, id in ipairs(suspects) do
      local job = load_job(id)
      if not job or job.state ~= 'queued' then
        call('ZREM', K.queued .. priority, id)
      elseif not waiting[id .. '#' .. job.delivery] then
        give_back(id, job, job.attempt > 0 and 'retrying' or 'pending', now, tonumber(job.after), '', 'its message was lost: released again', '')
        drop_unacked(id, job)
        count('messages_reclaimed')
        found[#found + 1] = id
      end
    end
  end
end
-- the same: who waits for a span of time waits for it from now on
local delays = call('ZRANGEBYSCORE', K.delays, '(' .. text(now + 1000), '+inf', 'WITHSCORES', 'LIMIT', 0, most)
for i = 1, #delays, 2 do
  local id, back = delays[i], tonumber(delays[i + 1]) - now
  local job = load_job(id)
  if not job then
    call('ZREM', K.delays, id)
  else
    remember(id, now, job.state, job.state, job.attempt, '', 'the clock was set back: its wait begins again', '')
    unwait(id, job)
    job.after = text(math.max(now, tonumber(job.after) - back))
    call('HSET', K.job .. id, 'after', job.after)
    -- it may have been held, which ends here until release comes to it
    follow_definition(id, job, now)
    wait(id, job.priority, tonumber(job.after), tonumber(job.seq))
    note_delay(id, now)
  end
end
-- the same: who waits for a limit for long looks again
local long, unblocked = text(now + 60000), false
for _, priority in ipairs(PRIORITIES) do
  for _, definition in ipairs(call('ZRANGEBYSCORE', K.blocked .. priority, long, '(' .. EVENT)) do
    unblock_lane(priority, definition)
    unblocked = true
  end
end
for _, host in ipairs(call('ZRANGEBYSCORE', K.gates, long, '(' .. EVENT)) do call('ZADD', K.gates, 0, host) end
unblocked = tend_breakers(now, patience, ARGV[4] == '1') or unblocked
-- should a change of a user's cap have stopped halfway, or what was put back for it wait in a lane that was blocked since
for _, user in ipairs(call('SRANDMEMBER', K.capped_users, 10)) do uncap(user, 100, now) end
-- at once: whoever looks at a lane that is not blocked must not find jobs there that are overdue
if #found > 0 or unblocked then release(now, 100) end
return found
