-- What the scripts share: time, transitions, the waiting set, limits and release. It stands before each of them.

local call = redis.call

-- `now` as given, or the server's clock: one clock for all processes.
local function clock(now)
  if now ~= '' then return tonumber(now) end
  local t = call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function parts(id)
  return string.match(id, '^([^:]+):([^:]+):(.+)$')
end

local function text(number)
  return string.format('%.0f', number)
end

local function pairs_to_table(list)
  local t = {}
  for i = 1, #list, 2 do t[list[i]] = list[i + 1] end
  return t
end

-- Change log -----------------------------------------------------------------------------------------------------

local function log_change(now, size, actor, kind, subject, detail)
  call('XADD', K.changes, 'MAXLEN', '~', size, '*', 'at', text(now), 'actor', actor, 'kind', kind, 'subject', subject, 'detail', detail)
end

-- Leading --------------------------------------------------------------------------------------------------------

-- Whether the leader of this term still leads: one that slept meanwhile must not publish its old catalogue.
local function leads(term)
  return term == '' or term == call('HGET', K.planner, 'term')
end

-- State and history ----------------------------------------------------------------------------------------------

local function remember(id, now, from, to, attempt, worker, reason, detail)
  call('RPUSH', K.history .. id, '[' .. text(now) .. ',"' .. from .. '","' .. to .. '",' .. attempt .. ',' ..
    cjson.encode(worker) .. ',' .. cjson.encode(reason) .. (detail ~= '' and (',' .. detail) or '') .. ']')
end

-- Moves a job from the state it is in to another, and keeps that. An error here is a bug of a script; what was written before
-- it stays written, so a script moves a job first and changes the rest after it.
local function move(id, from, to, now, attempt, worker, reason, detail)
  if not (ALLOWED[from] and ALLOWED[from][to]) then
    error('transition ' .. from .. ' -> ' .. to .. ' of ' .. id .. ' is not allowed')
  end
  call('HSET', K.job .. id, 'state', to)
  call('HINCRBY', K.counts, to, 1)
  remember(id, now, from, to, attempt, worker, reason, detail)
end

-- Waiting set: one lane for each priority and definition, so that a lane that may not go holds back no other -----

local function refresh_lane(priority, definition)
  if call('ZSCORE', K.blocked .. priority, definition) then return end
  local head = call('ZRANGE', K.lane .. priority .. ':' .. definition, 0, 0, 'WITHSCORES')
  if head[1] then
    call('ZADD', K.ready .. priority, head[2], definition)
  else
    call('ZREM', K.ready .. priority, definition)
  end
end

local function lane_member(seq, id)
  return string.format('%011x', seq) .. ':' .. id
end

local function wait(id, priority, after, seq)
  local definition = parts(id)
  call('ZADD', K.lane .. priority .. ':' .. definition, text(after), lane_member(seq, id))
  refresh_lane(priority, definition)
end

-- Takes a job that waits out of the waiting set, wherever it waits.
local function unwait(id, job)
  local definition, user = parts(id)
  local removed = call('ZREM', K.lane .. job.priority .. ':' .. definition, lane_member(tonumber(job.seq), id))
  if removed == 1 then
    refresh_lane(job.priority, definition)
  else
    call('SREM', K.held .. user, id)
  end
end

local function block_lane(priority, definition, untilms)
  call('ZREM', K.ready .. priority, definition)
  call('ZADD', K.blocked .. priority, untilms, definition)
end

local function unblock_lane(priority, definition)
  call('ZREM', K.blocked .. priority, definition)
  refresh_lane(priority, definition)
end

-- Jobs -----------------------------------------------------------------------------------------------------------

local function load_job(id)
  local list = call('HGETALL', K.job .. id)
  if #list == 0 then return nil end
  local job = pairs_to_table(list)
  job.attempt = tonumber(job.attempt or '0')
  job.delivery = tonumber(job.delivery or '0')
  job.losses = tonumber(job.losses or '0')
  return job
end

local function count_unfinished(id, by)
  local definition, user = parts(id)
  local key = K.unfinished .. definition
  if by > 0 then
    if call('HGET', K.definition .. definition, 'overlap') == 'skip' then
      call('HINCRBY', key, user, 1)
      -- noted in the job, because the definition's policy may be another when it ends
      call('HSET', K.job .. id, 'counted', 1)
    end
  elseif call('HDEL', K.job .. id, 'counted') == 1 and call('HINCRBY', key, user, -1) <= 0 then
    call('HDEL', key, user)
  end
end

-- Ends a job: a terminal transition and all that follows from it.
local function conclude(id, job, to, now, worker, reason, detail)
  move(id, job.state, to, now, job.attempt, worker, reason, detail)
  if job.state == 'running' then
    call('ZREM', K.active, id)
    call('SREM', K.worker_jobs .. job.worker, id)
  elseif job.state == 'queued' then
    call('ZREM', K.queued .. job.priority, id)
  elseif job.state == 'pending' or job.state == 'retrying' then
    unwait(id, job)
  end
  call('HSET', K.job .. id, 'finished', text(now))
  call('ZADD', K.finished, text(now), id)
  count_unfinished(id, -1)
  job.state = to
end

-- Puts a job that is queued or running back into the waiting set.
local function give_back(id, job, to, now, after, worker, reason, detail)
  move(id, job.state, to, now, job.attempt, worker, reason, detail)
  if job.state == 'running' then
    call('ZREM', K.active, id)
    call('SREM', K.worker_jobs .. job.worker, id)
  elseif job.state == 'queued' then
    call('ZREM', K.queued .. job.priority, id)
  end
  local seq = job.seq
  if after > tonumber(job.after) then seq = call('INCR', K.seq) end
  call('HSET', K.job .. id, 'after', text(after), 'seq', seq)
  wait(id, job.priority, after, tonumber(seq))
end

-- The broker's note that a worker holds a message. The worker that held it is gone, or no longer counts.
local function drop_unacked(id, job)
  local tag = id .. '#' .. job.delivery
  call('HDEL', K.unacked, tag)
  call('ZREM', K.unacked_index, tag)
end

-- The process that ran a job is gone: another run, or the end for a job that takes its processes down.
-- A lost run has its own count and does not use up the retries. One that died before the run began has not failed: it is rejected.
local function lose(id, job, now, worker, what, most_losses, backoff)
  local losses, ran = job.losses + 1, job.state == 'running'
  if losses >= most_losses then
    conclude(id, job, ran and 'failed' or 'rejected', now, worker, 'poison pill: ' .. what .. ', ' .. losses .. ' losses in all', '')
  else
    give_back(id, job, 'retrying', now, now + backoff * 2 ^ (losses - 1), worker, what, '')
  end
  call('HSET', K.job .. id, 'losses', losses)
  if ran then call('HSET', K.job .. id, 'budget', tonumber(job.budget or '0') + 1) end
  drop_unacked(id, job)
end

-- Limits: GCRA, one number for each (https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm) --------------------

-- How far the theoretical arrival time lies ahead, apart from now: in their sum fractions of a millisecond would get lost,
-- and with them the limit in the long run. It may be forgotten a while after it lies in the past.
local function take_token(name, ahead, now)
  call('SET', K.limit .. name, text(now) .. ' ' .. string.format('%.17g', ahead), 'PX', text(math.ceil(ahead) + 60000))
end

-- In how many ms the limit lets the next job go, and how far ahead its arrival time lies then.
local function next_token(name, per_second, burst, now)
  local interval, ahead = 1000 / per_second, 0
  local kept = call('GET', K.limit .. name)
  if kept then
    local at, before = string.match(kept, '^(%d+) (.+)$')
    ahead = math.max(0, tonumber(at) - now + tonumber(before))
    if ahead > burst * interval + 1 then
      -- the limit was raised, or the clock set back, since
      ahead = burst * interval
      take_token(name, ahead, now)
    end
  end
  return ahead - (burst - 1) * interval, ahead + interval
end

-- Release --------------------------------------------------------------------------------------------------------

local function fill(template, values)
  return (string.gsub(template, '@@(%u+)@@', values))
end

-- Of the lanes whose heads are due at the same millisecond, the one whose head was submitted first. `ties` keeps them from
-- one call to the next, between which only the lane that was given may change: there can be one for each definition.
local function first_lane(priority, now, ties)
  local ready = K.ready .. priority
  local head = call('ZRANGE', ready, 0, 0, 'WITHSCORES')
  if not head[1] or tonumber(head[2]) > now then return nil end
  local changed = { ties.given }
  if ties.score ~= head[2] then
    ties.score, ties.heads = head[2], {}
    changed = call('ZRANGEBYSCORE', ready, head[2], head[2])
  end
  for _, definition in ipairs(changed) do
    local tied = call('ZSCORE', ready, definition) == head[2]
    ties.heads[definition] = tied and call('ZRANGE', K.lane .. priority .. ':' .. definition, 0, 0)[1] or nil
  end
  local best, best_member = nil, nil
  for definition, member in pairs(ties.heads) do
    if not best or member < best_member then best, best_member = definition, member end
  end
  ties.given = best
  return best, best_member
end

local function subscription_paused(user, definition)
  local values = call('HMGET', K.user .. user, '@paused', definition)
  if values[1] == '1' then return 'user paused' end
  if values[2] and string.find(values[2], '"paused":1', 1, true) then return 'subscription paused' end
  return nil
end

-- Moves due jobs to their broker queues, in strict priority, first come first served inside it, within the limits and
-- the queues' depth. Returns how many, and when the next could go (nil: nothing waits for a known time).
local function release(now, most)
  local released, looked, definitions, in_queue = 0, 0, {}, {}
  local capacity = pairs_to_table(call('HGETALL', K.capacity))
  local overall = call('HGET', K.limits, 'global')
  overall = overall and cjson.decode(overall)
  local next_at = nil
  local function later(at)
    if at and (not next_at or at < next_at) then next_at = at end
  end
  for _, priority in ipairs(PRIORITIES) do
    for _, definition in ipairs(call('ZRANGEBYSCORE', K.blocked .. priority, '-inf', text(now))) do
      unblock_lane(priority, definition)
    end
    in_queue[priority] = call('ZCARD', K.queued .. priority)
    local depth, before, ties = tonumber(capacity[priority] or '0'), 0, {}
    for _, higher in ipairs(PRIORITIES) do
      if higher == priority then break end
      before = before + in_queue[higher] * tonumber(capacity[higher .. '>' .. priority] or '0')
    end
    while before + in_queue[priority] < depth do
      local definition, member = first_lane(priority, now, ties)
      if not definition then break end
      looked = looked + 1
      if looked > most then return released, now end
      local id = string.sub(member, 13)
      local known = definitions[definition]
      if not known then
        local values = call('HMGET', K.definition .. definition, 'message', 'rate', 'burst')
        known = { message = values[1], rate = tonumber(values[2]), burst = tonumber(values[3]) }
        definitions[definition] = known
      end
      local job = load_job(id)
      local _, user = parts(id)
      if not job then
        call('ZREM', K.lane .. priority .. ':' .. definition, member)
        refresh_lane(priority, definition)
      elseif not known.message then
        conclude(id, job, 'rejected', now, '', 'definition ' .. definition .. ' does not exist any more', '')
      else
        local why = subscription_paused(user, definition)
        if why then
          call('ZREM', K.lane .. priority .. ':' .. definition, member)
          refresh_lane(priority, definition)
          call('SADD', K.held .. user, id)
          remember(id, now, job.state, job.state, job.attempt, '', 'held: ' .. why, '')
        else
          local delay, ahead, own_delay, own_ahead = 0, nil, 0, nil
          if overall then
            delay, ahead = next_token('global', overall.rate, overall.burst, now)
            if delay > 0 then later(now + delay) return released, next_at end
          end
          if known.rate then own_delay, own_ahead = next_token('definition:' .. definition, known.rate, known.burst, now) end
          if own_delay > 0 then
            block_lane(priority, definition, string.format('%.3f', now + own_delay))
          else
            if ahead then take_token('global', ahead, now) end
            if own_ahead then take_token('definition:' .. definition, own_ahead, now) end
            call('ZREM', K.lane .. priority .. ':' .. definition, member)
            refresh_lane(priority, definition)
            local delivery = job.delivery + 1
            move(id, job.state, 'queued', now, job.attempt, '', 'released', '')
            call('HSET', K.job .. id, 'delivery', delivery)
            call('ZADD', K.queued .. priority, text(now), id)
            call('LPUSH', priority, fill(known.message,
              { ID = id, USER = user, DELIVERY = tostring(delivery), RETRIES = tostring(job.attempt), QUEUE = priority }))
            released = released + 1
            in_queue[priority] = in_queue[priority] + 1
          end
        end
      end
    end
    if before + in_queue[priority] < depth then
      local head = call('ZRANGE', K.ready .. priority, 0, 0, 'WITHSCORES')
      if head[1] then later(tonumber(head[2])) end
      local blocked = call('ZRANGE', K.blocked .. priority, 0, 0, 'WITHSCORES')
      if blocked[1] and blocked[2] ~= 'inf' then later(tonumber(blocked[2])) end
    end
  end
  return released, next_at
end

-- Making jobs ----------------------------------------------------------------------------------------------------

-- The record of a job that waits, and its place among the user's jobs; the caller puts it into its lane. The record says when
-- and by what it was made, so that its history needs no line for that.
local function create(id, user, now, priority, after, seq, source, params)
  local key = K.job .. id
  if params == '' then
    call('HSET', key, 'state', 'pending', 'priority', priority, 'after', after, 'seq', seq, 'made', now, 'source', source)
  else
    call('HSET', key, 'state', 'pending', 'priority', priority, 'after', after, 'seq', seq, 'made', now, 'source', source, 'params', params)
  end
  call('ZADD', K.user_jobs .. user, now, id)
end

-- Forgetting -----------------------------------------------------------------------------------------------------

local function forget_job(id)
  local definition, user = parts(id)
  call('DEL', K.job .. id, K.history .. id)
  call('ZREM', K.user_jobs .. user, id)
  call('ZREM', K.definition_jobs .. definition, id)
  call('ZREM', K.finished, id)
end

-- Workers --------------------------------------------------------------------------------------------------------

-- How many released jobs may wait in each queue: so many for each slot of the workers that serve it. And which share of
-- each higher queue's slots serve it too: so much of what waits there goes before what waits here.
local function count_capacity()
  local depth, slots = {}, {}
  for _, worker in ipairs(call('ZRANGE', K.workers, 0, -1)) do
    local values = call('HMGET', K.worker .. worker, 'slots', 'queues', 'buffer')
    local own = tonumber(values[1] or '0')
    local served = {}
    if own > 0 then
      for priority in string.gmatch(values[2], '[^,]+') do served[#served + 1] = priority end
    end
    for _, priority in ipairs(served) do
      depth[priority] = (depth[priority] or 0) + own * tonumber(values[3])
      for _, other in ipairs(served) do
        local pair = other .. '>' .. priority
        slots[pair] = (slots[pair] or 0) + own
      end
    end
  end
  call('DEL', K.capacity)
  for priority, messages in pairs(depth) do
    call('HSET', K.capacity, priority, math.max(1, math.ceil(messages)))
    for _, higher in ipairs(PRIORITIES) do
      if higher == priority then break end
      local pair = higher .. '>' .. priority
      if slots[pair] then call('HSET', K.capacity, pair, slots[pair] / slots[higher .. '>' .. higher]) end
    end
  end
end

local function forget_worker(worker)
  call('ZREM', K.workers, worker)
  call('DEL', K.worker .. worker, K.worker_jobs .. worker)
  count_capacity()
end

-- Subscriptions --------------------------------------------------------------------------------------------------

-- Most are plain, and that must be seen without decoding.
local function encode_subscription(subscription)
  local plain = true
  for field in pairs(subscription) do
    if field ~= 'since' then plain = false end
  end
  if plain then return '{"since":' .. text(subscription.since) .. '}' end
  return cjson.encode(subscription)
end

local function join_group(user, definition, gid, schedule, slot, now, horizon, since)
  local group_key = K.group .. gid
  call('ZADD', K.slots .. gid, slot, user)
  if call('EXISTS', group_key) == 0 then
    local known = call('HMGET', K.definition .. definition, 'schedule', 'window')
    if schedule == '' then schedule = known[1] end
    -- an occurrence before now may have moments after `since`
    call('HSET', group_key, 'definition', definition, 'schedule', schedule, 'cursor', text(since - tonumber(known[2])))
    call('SADD', K.groups .. definition, gid)
    call('ZADD', K.due, text(now), 'g|' .. gid)
  end
  -- a window that is open may still have this user's slot before it
  for _, oid in ipairs(call('SMEMBERS', K.open .. gid)) do
    local values = call('HMGET', K.occurrence .. oid, 'base', 'window', 'cursor')
    if values[1] and tonumber(values[3]) < tonumber(slot) then
      local at = tonumber(values[1]) + math.floor(tonumber(slot) * tonumber(values[2]))
      call('ZADD', K.due, 'LT', text(at - horizon), 'o|' .. oid)
    end
  end
end

local function leave_groups(user, definition, subscription)
  if call('HINCRBY', K.subscribers, definition, -1) <= 0 then call('HDEL', K.subscribers, definition) end
  call('ZREM', K.slots .. (subscription.group or definition), user)
  for _, before in ipairs(subscription.prev or {}) do call('ZREM', K.slots .. before[1], user) end
end

-- Cancels the planned jobs of a subscription that have not started; what was submitted by hand stays.
local function cancel_waiting(user, definition, now, reason)
  local canceled = 0
  for _, id in ipairs(call('ZRANGE', K.user_jobs .. user, 0, -1)) do
    if parts(id) == definition then
      local job = load_job(id)
      if job and job.source ~= 'api' and (job.state == 'pending' or job.state == 'queued' or job.state == 'retrying') then
        conclude(id, job, 'canceled', now, '', reason, '')
        canceled = canceled + 1
      end
    end
  end
  return canceled
end

-- Puts back what was held for a pause of this user, where no other pause holds it.
local function unhold(user, now)
  for _, id in ipairs(call('SMEMBERS', K.held .. user)) do
    local job = load_job(id)
    local definition = parts(id)
    if not job then
      call('SREM', K.held .. user, id)
    elseif not subscription_paused(user, definition) then
      call('SREM', K.held .. user, id)
      remember(id, now, job.state, job.state, job.attempt, '', 'no longer held', '')
      wait(id, job.priority, tonumber(job.after), tonumber(job.seq))
    end
  end
  release(now, 100)
end
