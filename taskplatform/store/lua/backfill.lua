-- Makes the next jobs of a backfill, as many as its rate lets it, and moves its cursor: both or neither.
-- ARGV[1] now   ARGV[2] backfill   ARGV[3] the cursor that the planner saw   ARGV[4] how many subscribers to look at
-- ARGV[5] 1: after these occurrences there are no more   ARGV[6] who plans   ARGV[7] size of the change log
-- ARGV[8…] by threes: time of an occurrence, <gid>, the schedule that the planner saw; from the cursor on, in order
-- Returns {state, jobs made, occurrences passed, the new cursor, 1 where the planner must look anew at groups and schedules}; the state is
-- 'unknown' where there is no such backfill, and 'moved' where the cursor is not the one that was seen.

local now, id, most, no_more = clock(ARGV[1]), ARGV[2], tonumber(ARGV[4]), ARGV[5] == '1'
local key = K.backfill .. id
local jobs_key = K.backfill_jobs .. id
local given_key = K.backfill_users .. id
-- jobs are made so long before their moments (ms), and the planner looks again when half of that is left
local AHEAD = 2000
-- how long it waits for what only time can change; and between two looks at subscribers who need nothing, so that Redis has time for others
local LOOK, PAUSE = 1000, 10
-- who is not finished with an earlier job, where a definition lets only one be, is waited for so long; or for one attempt's time
local PATIENCE = 600000

local list = call('HGETALL', key)
if #list == 0 then
  call('ZREM', K.due, 'b|' .. id)
  return { 'unknown', 0, 0, '', 0 }
end
local backfill = pairs_to_table(list)
if backfill.state ~= 'running' then
  if backfill.state ~= 'canceling' then call('ZREM', K.due, 'b|' .. id) end
  return { backfill.state, 0, 0, backfill.cursor, 0 }
end
if backfill.cursor ~= ARGV[3] then return { 'moved', 0, 0, backfill.cursor, 0 } end

local definition = backfill.definition
local known = call('HMGET', K.definition .. definition, 'priority', 'overlap', 'paused', 'timeout')
local function ended(state, reason)
  backfills.close(id, state, reason, now)
  log_change(now, ARGV[7], ARGV[6], 'backfill', definition, id .. ' ' .. state .. (reason ~= '' and ': ' .. reason or ''))
end
if not known[1] then
  ended('stopped', 'definition removed')
  return { 'stopped', 0, 0, backfill.cursor, 0 }
end
if known[3] then
  call('HSET', key, 'held', 'definition paused, ' .. known[3])
  call('ZADD', K.due, text(now + LOOK), 'b|' .. id)
  return { 'running', 0, 0, backfill.cursor, 0 }
end
local no_overlap, patience = known[2] == 'skip', math.max(PATIENCE, tonumber(known[4] or '0') + 60000)

-- One job each `spacing` ms; `moment` is when the next may be due. Should the clock have been set back, that is so far ahead as it was.
local spacing, moment = 1000 / tonumber(backfill.rate), tonumber(backfill.moment or '0')
local moved_at = tonumber(backfill.moved or '0')
local set_back = now < moved_at
if set_back then moment = moment - (moved_at - now) end
local room = tonumber(backfill.most) - call('ZCARD', jobs_key)
local oldest = backfill.known ~= '' and now - tonumber(backfill.known) or 0

local counts = { made = 0, existing = 0, paused = 0, disabled = 0, overlapping = 0, left = 0, forgotten = 0, passed = 0 }
local function add(what) counts[what] = counts[what] + 1 end

local priority, jobs = PRIORITIES[#PRIORITIES], {}
local at, gid, slot = string.match(backfill.cursor, '^(%S+) (%S+) (%S+)$')
-- why it goes no further now, and when to look again
local held, again, anew, waits_for = '', nil, 0, ''

-- Whether a user whose earlier job is not finished shall be waited for.
local function must_wait(user)
  if not (no_overlap and call('HGET', K.unfinished .. definition, user)) then return false end
  local since = string.match(backfill.waits_for or '', '^(%d+) ' .. at .. ' ')
  local whom = string.match(backfill.waits_for or '', ' (%S+)$')
  if whom ~= user or not since or tonumber(since) > now then since = text(now) end
  waits_for = since .. ' ' .. at .. ' ' .. user
  return now - tonumber(since) < patience
end

local function make(user, params)
  local after = math.max(moment, now)
  moment = after + spacing
  room = room - 1
  jobs[#jobs + 1] = { id = definition .. ':' .. user .. ':' .. at, user = user, after = text(math.ceil(after)), params = params }
  add('made')
  if no_overlap then
    -- at once: the next one may be of the same user
    local job = jobs[#jobs]
    job.seq = call('INCR', K.seq)
    create(job.id, user, text(now), priority, job.after, job.seq, 'backfill', params)
    count_unfinished(job.id, 1)
  end
end

-- Looks at the subscribers after `slot`. Returns whether none is left.
local function go_through()
  local from_given = false
  local members_key = K.slots .. gid
  if backfill.users ~= '' and call('ZCARD', given_key) < call('ZCARD', members_key) then from_given = true end
  local function page(first, last, ...)
    if from_given then return call('ZRANGEBYSCORE', given_key, first, last, 'WITHSCORES', ...) end
    return call('ZRANGEBYSCORE', members_key, first, last, 'WITHSCORES', ...)
  end
  local found = page('(' .. slot, '+inf', 'LIMIT', 0, most)
  local full = #found == 2 * most
  if full then
    -- all who share the last slot go together, because the cursor is a slot
    local score, seen = found[#found], {}
    for i = 1, #found, 2 do seen[found[i]] = true end
    local ties = page(score, score)
    for i = 1, #ties, 2 do
      if not seen[ties[i]] then
        found[#found + 1] = ties[i]
        found[#found + 1] = ties[i + 1]
      end
    end
  end
  for i = 1, #found, 2 do
    local user, score = found[i], found[i + 1]
    local verdict, params = 'elsewhere', nil
    if backfill.users == '' or from_given or call('ZSCORE', given_key, user) then
      verdict, params = backfills.verdict(user, definition, gid, at)
    end
    if verdict == 'make' then
      local shares_slot = score == slot
      local waits = must_wait(user)
      if waits and not shares_slot then
        held, again = 'a job of ' .. user .. ' is not finished, and the definition lets only one be (overlap: skip)', now + LOOK
        return false
      elseif waits or waits_for ~= '' then
        add('overlapping')
        waits_for = ''
      elseif room <= 0 and not shares_slot then
        held, again = 'as many of its jobs as may be are not finished', now + LOOK
        return false
      elseif moment > now + AHEAD and not shares_slot then
        again = math.max(now + PAUSE, math.floor(moment - AHEAD / 2))
        return false
      else
        make(user, params)
      end
    elseif verdict == 'exists' then
      add('existing')
    elseif verdict ~= 'elsewhere' then
      add(verdict)
    end
    slot = score
  end
  most = most - #found / 2
  if full then again = now + PAUSE end
  return not full
end

for i = 8, #ARGV, 3 do
  if ARGV[i] ~= at or ARGV[i + 1] ~= gid then at, gid, slot = ARGV[i], ARGV[i + 1], '-1' end
  local group = call('HMGET', K.group .. gid, 'cursor', 'schedule')
  local done = slot == 'end' or not group[1]
  if not done and group[2] ~= ARGV[i + 2] then
    anew, again = 1, now
  elseif not done and tonumber(group[1]) < tonumber(at) then
    held, again = 'the planner has not come to this occurrence', now + LOOK
  elseif not done and tonumber(at) < oldest then
    add('forgotten')
    done = true
  elseif not done and call('HGET', K.occurrence .. gid .. '|' .. at, 'state') == 'open' then
    -- who has no job of it yet gets one at the moment that was foreseen
    add('left')
    done = true
  elseif not done then
    done = go_through()
  end
  if not done then break end
  slot = 'end'
  add('passed')
end

-- the first write takes memory, so that a full server refuses all of it
local made_at = text(now)
local waiting_key = K.lane .. priority .. ':' .. definition
for _, job in ipairs(jobs) do
  if not job.seq then
    job.seq = call('INCR', K.seq)
    create(job.id, job.user, made_at, priority, job.after, job.seq, 'backfill', job.params)
  end
  -- of its own: a change of the definition's priority leaves it as it is
  call('HSET', K.job .. job.id, 'own', 1, 'backfill', id, 'maker', backfill.actor)
  call('ZADD', K.definition_jobs .. definition, made_at, job.id)
  call('ZADD', jobs_key, made_at, job.id)
  call('ZADD', waiting_key, job.after, lane_member(job.seq, job.id))
  if tonumber(job.after) > now then note_delay(job.id, now) end
end
if #jobs > 0 then
  lane_changed(priority, definition)
  call('HINCRBY', K.counts, 'pending', #jobs)
end
if #jobs > 0 or set_back then call('HSET', key, 'moment', string.format('%.17g', moment), 'moved', made_at) end
local cursor = at and at .. ' ' .. gid .. ' ' .. slot or ''
call('HSET', key, 'cursor', cursor, 'held', held, 'waits_for', waits_for)
for what, number in pairs(counts) do
  if number > 0 then call('HINCRBY', key, what, number) end
end
if not again and no_more then
  ended('done', '')
  return { 'done', #jobs, counts.passed, cursor, 0 }
end
call('ZADD', K.due, text(again or now + PAUSE), 'b|' .. id)
return { 'running', #jobs, counts.passed, cursor, anew }
