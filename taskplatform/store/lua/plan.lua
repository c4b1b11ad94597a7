-- Makes the jobs of the next subscribers of an open occurrence, and moves its cursor: both or neither.
-- ARGV[1] now   ARGV[2] horizon in ms   ARGV[3] <oid>   ARGV[4] how many subscribers to read
-- Returns {state, jobs made, when to look again ('' when done)}; state is open, done, skipped or gone.

local now, horizon, oid, most = clock(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local okey = K.occurrence .. oid
local list = call('HGETALL', okey)
if #list == 0 then
  call('ZREM', K.due, 'o|' .. oid)
  return { 'gone', 0, '' }
end
local occurrence = pairs_to_table(list)
if occurrence.state ~= 'open' then
  call('ZREM', K.due, 'o|' .. oid)
  return { occurrence.state, 0, '' }
end

local definition, group = occurrence.definition, occurrence.group
local at, base, window = tonumber(occurrence.at), tonumber(occurrence.base), tonumber(occurrence.window)
local cursor = tonumber(occurrence.cursor)
-- should the clock have been set back: a window that was counted from an instant then goes on from now
local counted_from = tonumber(occurrence.moved or occurrence.source ~= 'schedule' and occurrence.opened or 0)
if counted_from > now + 1000 then
  base = base - (counted_from - now)
  move_window(oid, text(base), text(window), now)
end
local from_now = counted_from > 0

local function close(state, reason)
  call('HSET', okey, 'state', state, 'reason', reason, 'done', text(now))
  call('ZREM', K.due, 'o|' .. oid)
  call('SREM', K.open .. group, oid)
  call('HDEL', K.committed, oid)
  call('ZADD', K.closed, text(now), oid)
end

local known = call('HMGET', K.definition .. definition, 'priority', 'overlap', 'paused')
if not known[1] or known[3] then
  local reason = known[3] and ('definition paused, ' .. known[3]) or 'definition removed'
  close('skipped', reason)
  call('HINCRBY', K.planner, known[3] and 'skipped_paused' or 'skipped_removed', 1)
  return { 'skipped', 0, '' }
end
local priority, no_overlap = known[1], known[2] == 'skip'

local slots_key = K.slots .. group
local function after_cursor(last, count)
  return call('ZRANGEBYSCORE', slots_key, '(' .. string.format('%.17g', cursor), last, 'WITHSCORES', 'LIMIT', 0, count)
end

-- Up to here subscriptions are as they were: a change must not reach what is planned.
if now + horizon > tonumber(call('HGET', K.planner, 'reach') or '0') then call('HSET', K.planner, 'reach', text(now + horizon)) end

local last = window > 0 and (now + horizon + 1 - base) / window or (base <= now + horizon and 1 or -1)
local found = after_cursor(string.format('%.17g', last), most)
if #found == 2 * most then
  -- all who share the last slot go together, because the cursor is a slot
  local score = found[#found]
  local seen = {}
  for i = 1, #found, 2 do seen[found[i]] = true end
  for _, user in ipairs(call('ZRANGEBYSCORE', slots_key, score, score)) do
    if not seen[user] then
      found[#found + 1] = user
      found[#found + 1] = score
    end
  end
end

-- Whether the moment belongs to this group by the user's subscription, now or before a change of schedule.
local function applies(subscription, nominal)
  if (subscription.group or definition) == group and nominal > (subscription.since or 0) then return true end
  for _, before in ipairs(subscription.prev or {}) do
    if before[1] == group and nominal > before[2] and nominal <= before[3] then return true end
  end
  return false
end

-- Whether an older occurrence of this group is open: it may have moments of users who left since, and comes later when it is
-- caught up.
local older = nil
local function older_is_open()
  if older == nil then
    older = false
    for _, other in ipairs(call('SMEMBERS', K.open .. group)) do
      if tonumber(string.match(other, '|t?(%d+)$')) < at then older = true end
    end
  end
  return older
end

-- Drops the times that the user was in this group and that have passed, and the user with the last of them.
local function forget(user, subscription, nominal)
  if older_is_open() then return end
  local stays, before, kept = (subscription.group or definition) == group, subscription.prev or {}, {}
  for _, one in ipairs(before) do
    if one[1] ~= group or nominal <= one[3] then
      kept[#kept + 1] = one
      stays = stays or one[1] == group
    end
  end
  if not stays then call('ZREM', slots_key, user) end
  if #kept < #before then
    subscription.prev = #kept > 0 and kept or nil
    call('HSET', K.user .. user, definition, encode_subscription(subscription))
  end
end

local suffix, source = occurrence.suffix, occurrence.source
local triggered = source == 'trigger'
local paused, disabled = 0, 0
-- who is to have a job: users, the moments and own parameters of their jobs; and, for the index, when each is made and its id
local wanting, users, moments, own_params, index = 0, {}, {}, {}, {}
local made_at = text(now)
local prefix, ending = definition .. ':', ':' .. suffix

for i = 1, #found, 2 do
  local user, score = found[i], tonumber(found[i + 1])
  local offset = math.floor(score * window)
  if base + offset > now + horizon then break end
  cursor = score
  local values = call('HMGET', K.user .. user, '@paused', definition)
  local raw = values[2]
  if not raw then
    call('ZREM', slots_key, user)
  else
    -- a trigger is for all: who is in two groups, because of a change, has the same job in both
    local params, wanted, off = '', triggered, nil
    -- most subscriptions are plain: {"since":…}
    local since = string.match(raw, '^{"since":(%d+)}$')
    if since and group == definition then
      wanted = wanted or at + offset > tonumber(since)
    else
      local readable, subscription = pcall(cjson.decode, raw)
      if not readable then
        -- one broken record must not stop the others, nor leave their jobs half made
        redis.log(redis.LOG_WARNING, 'taskplatform: the subscription of ' .. user .. ' to ' .. definition .. ' cannot be read')
        subscription = { off = 1, since = 0 }
      end
      wanted = wanted or applies(subscription, at + offset)
      if not triggered and (subscription.prev or not wanted) then forget(user, subscription, at + offset) end
      off = subscription.off and 'disabled' or subscription.paused and 'paused'
      params = subscription.params or ''
    end
    if values[1] == '1' then off = 'paused' end
    if wanted and off then
      wanted = false
      if off == 'paused' then paused = paused + 1 else disabled = disabled + 1 end
    end
    if wanted and base + offset < now - horizon then
      -- late, because the planner was away: what is left is spread from now on, not fired at once
      base = now - offset
      from_now = true
      move_window(oid, text(base), text(window), now)
    end
    if wanted then
      wanting = wanting + 1
      users[wanting], moments[wanting], own_params[wanting] = user, base + offset, params
      index[2 * wanting - 1], index[2 * wanting] = made_at, prefix .. user .. ending
    end
  end
end

-- unpack has a limit of about 8,000 values
local function in_parts(values, write)
  local written = 0
  for i = 1, #values, 4000 do
    written = written + write(unpack(values, i, math.min(i + 3999, #values)))
  end
  return written
end

-- One occurrence, one job, also where a subscriber comes up twice. Every job that exists is among those of its definition, so
-- each must be looked at only where not all of these are new there.
local index_key = K.definition_jobs .. definition
local all_new = in_parts(index, function(...) return call('ZADD', index_key, 'NX', ...) end) == wanting

local made, lane, records, delays = 0, {}, {}, {}
local record_start, record_end = priority .. ' ', ' ' .. made_at .. ' ' .. source
local seq = call('INCRBY', K.seq, wanting) - wanting
for i = 1, wanting do
  local user, after, params, id = users[i], moments[i], own_params[i], index[2 * i]
  if all_new or not load_job(id) then
    seq = seq + 1
    made = made + 1
    local digits = seq_digits(seq)
    if params == '' and not no_overlap then
      records[#records + 1] = user
      records[#records + 1] = record_start .. after .. ' ' .. digits .. record_end
    else
      create(id, user, made_at, priority, after, seq, source, params)
    end
    local busy = no_overlap and call('HGET', K.unfinished .. definition, user)
    if no_overlap then count_unfinished(id, 1) end
    if busy then
      local job = { state = 'pending', priority = priority, seq = seq, attempt = 0 }
      conclude(id, job, 'rejected', now, '', 'overlap: the last job is not finished', '')
    else
      lane[#lane + 1] = after
      lane[#lane + 1] = digits .. ':' .. id
      if from_now then
        delays[#delays + 1] = made_at
        delays[#delays + 1] = id
      end
    end
  end
end
if #records > 0 then
  local key = packed_key(definition, suffix)
  in_parts(records, function(...) return call('HSET', key, ...) end)
  call('SADD', K.planned_suffixes .. definition, suffix)
end
if #lane > 0 then
  local key = K.lane .. priority .. ':' .. definition
  in_parts(lane, function(...) return call('ZADD', key, ...) end)
  lane_changed(priority, definition)
end
if #delays > 0 then in_parts(delays, function(...) return call('ZADD', K.delays, ...) end) end
if made > 0 then call('HINCRBY', K.counts, 'pending', made) end

call('HSET', okey, 'cursor', string.format('%.17g', cursor))
if made > 0 then call('HINCRBY', okey, 'planned', made) end
if paused > 0 then call('HINCRBY', okey, 'paused', paused) end
if disabled > 0 then call('HINCRBY', okey, 'disabled', disabled) end

-- When to look again: for the next subscriber, but not after the end of the window, which new ones may still join.
local following = after_cursor('+inf', 1)
local again = base + window
if following[2] then again = base + math.floor(tonumber(following[2]) * window) end
if not following[2] and base + window <= now + horizon then
  -- what was unusual about it stays
  close('done', occurrence.reason == 'due' and 'planned' or 'planned: ' .. occurrence.reason)
  -- who had left the group was in it until now
  drop_empty_group(definition, group)
  return { 'done', made, '' }
end
call('ZADD', K.due, text(again - horizon), 'o|' .. oid)
return { 'open', made, text(again - horizon) }
