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

-- A server at its maxmemory (noeviction) refuses a script at a write that takes memory if that is its first write, and lets it go on
-- once it has written: so no script stops halfway. What begins work is refused like that. What ends work, or keeps what there
-- is alive, goes on all the same: this is a write that takes none, and changes nothing.
local function even_when_full()
  call('HDEL', K.counters, '')
end

-- Counts what should be rare, for health and metrics.
local function count(what, by)
  call('HINCRBY', K.counters, what, by or 1)
end

-- Metrics --------------------------------------------------------------------------------------------------------

-- Counts something of a definition. What still ends of one that was removed leaves nothing behind.
local function tally(definition, what, by)
  local key = K.stats .. definition
  if call('HINCRBY', key, what, by) == by and call('EXISTS', K.definition .. definition) == 0 then call('DEL', key) end
end

-- The bucket of a histogram that a span belongs to: its upper bound in ms.
local function bucket_for(span)
  for _, bound in ipairs(BOUNDS) do
    if span <= bound then return bound end
  end
  return 'inf'
end

-- A run that was recorded as started has ended, and that is recorded now: `how` with the bucket of its span, so that one count tells both.
local function observe_run(definition, how, started, now)
  local span = math.max(0, now - tonumber(started))
  tally(definition, how .. '|' .. bucket_for(span), 1)
  tally(definition, 'ms', span)
end

-- A job started so long after it was due.
local function observe_lag(priority, after, now)
  local key, span = K.lags .. priority, math.max(0, now - tonumber(after))
  call('HINCRBY', key, bucket_for(span), 1)
  call('HINCRBY', key, 'ms', span)
end

-- Change log -----------------------------------------------------------------------------------------------------

local function log_change(now, size, actor, kind, subject, detail)
  call('XADD', K.changes, 'MAXLEN', '~', size, '*', 'at', text(now), 'actor', actor, 'kind', kind, 'subject', subject, 'detail', detail)
end

-- Trail: what changed for a user or a definition, from which `why` tells how things were at a time. It is kept for as long as finished
-- jobs, and written by the script that makes the change, so that it cannot disagree with it. A field of a hash is
-- "<1: as it is now is unusual, as a pause> <when it changed last> <entries as JSON, the oldest first>". What never changed has none.
-- An entry: a(t), k(ind), b(y), and what the kind needs:
--   paused (w: why), resumed
--   disabled, enabled      f: moments after this are in force again   s: they were after this
--   schedule               f: moments after this belong to what is now   g: the group before, s: since then, c: its schedule
--                          of a definition: c: the schedule before, f: occurrences after this are by the new one
--   subscribed (f), unsubscribed (g, s, c)   published, retracted
--   dropped                changes at and before this time were left out, because there were too many
local trail = {
  most = 60,
  aspect = {
    paused = 'pause', resumed = 'pause', disabled = 'on', enabled = 'on', schedule = 'group', subscribed = 'group',
    unsubscribed = 'group', published = 'published', retracted = 'published', dropped = 'dropped',
  },
}

-- How far back changes are told, in ms: somewhat longer than what they explain.
function trail.span()
  return tonumber(call('HGET', K.options, 'retention') or '259200000') + 3600000
end

-- Adds entries to a field of a trail. `unusual`: the state that they lead to must be explained for as long as it lasts. Where several
-- changes of one kind are older than the span, the newest of them says how things were when the span began.
function trail.add(key, field, now, unusual, lasts, ...)
  local span = trail.span()
  local before, value = now - span, call('HGET', key, field)
  local entries = value and cjson.decode(string.match(value, '^%d %d+ (.*)$')) or {}
  for _, entry in ipairs({ ... }) do
    -- in order also where the clock was set back
    entry.a = math.max(now, #entries > 0 and entries[#entries].a or 0)
    entries[#entries + 1] = entry
  end
  local kept, seen, dropped = {}, {}, nil
  for i = #entries, 1, -1 do
    local entry = entries[i]
    local aspect = trail.aspect[entry.k]
    if aspect == 'dropped' then
      if entry.a > before then dropped = dropped or entry.a end
    elseif #kept < trail.most and entry.a > before then
      kept[#kept + 1] = entry
    elseif not seen[aspect] then
      seen[aspect] = true
      kept[#kept + 1] = entry
    elseif entry.a > before then
      dropped = dropped or entry.a
    end
  end
  if dropped then kept[#kept + 1] = { a = dropped, k = 'dropped', b = '' } end
  local ordered = {}
  for i = #kept, 1, -1 do ordered[#ordered + 1] = kept[i] end
  call('HSET', key, field, (unusual and '1 ' or '0 ') .. text(now) .. ' ' .. cjson.encode(ordered))
  for other, told in pairs(pairs_to_table(call('HGETALL', key))) do
    local is_unusual, at = string.match(told, '^(%d) (%d+) ')
    if is_unusual == '1' then
      lasts = true
    elseif tonumber(at) <= before then
      call('HDEL', key, other)
    end
  end
  -- what lasts goes with its user
  call('PEXPIRE', key, lasts and '3155760000000' or text(span))
end

-- The same, only where the field has something already: what is now is as usual, and needs an entry only after others.
function trail.follow_up(key, field, now, lasts, entry)
  if call('HEXISTS', key, field) == 1 then trail.add(key, field, now, false, lasts, entry) end
end

-- A dead letter is forgotten before its time; `what` says why, in words. Where its occurrence is past the retention, nobody asks.
function trail.gone(id, job, now, what)
  local definition, user, suffix = parts(id)
  local span, at = trail.span(), tonumber(string.match(suffix, '^t?(%d+)$') or '0')
  if at <= now - span or call('EXISTS', K.user .. user) == 0 then return end
  local key = K.gone .. user
  call('ZADD', key, text(now), cjson.encode({ definition .. ':' .. suffix, tonumber(job.finished), job.died, what }))
  call('ZREMRANGEBYSCORE', key, '-inf', text(now - span))
  -- the newest 1000
  for _, oldest in ipairs(call('ZRANGE', key, 0, call('ZCARD', key) - 1001)) do call('ZREM', key, oldest) end
  call('PEXPIRE', key, text(span))
end

-- Audit log: a stream for each kind, so that what many can make happen pushes out nothing of another kind.
local function audit(now, kind, size, ...)
  call('XADD', K.audit .. kind, 'MAXLEN', '~', size, '*', 'at', text(now), ...)
end

-- Leading --------------------------------------------------------------------------------------------------------

-- Whether the leader of this term still leads: one that slept meanwhile must not publish its old catalogue.
local function leads(term)
  return term == '' or term == call('HGET', K.planner, 'term')
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

-- A planned job has at first no record of its own. It is a field of a hash that all of its occurrence share, which a batch fills
-- with one command, and it is not among the user's jobs: `packed_jobs` finds it by the definitions that the user subscribes to.
-- It stands for a job that waits in its lane and has no history but that it was made.
local function packed_key(definition, suffix)
  return K.planned .. definition .. ':' .. suffix
end

-- By id, what `load_job` read from packed records. `move` and `remember` pass by `unpack_record` before they write, and every
-- other write to a job comes after one of them, so that no job has both.
local packed = {}

local function load_packed(id)
  local definition, user, suffix = parts(id)
  if not definition then return nil end
  local key = packed_key(definition, suffix)
  local record = call('HGET', key, user)
  if not record then return nil end
  local priority, after, seq, made, source = string.match(record, '^(%S+) (%S+) (%S+) (%S+) (%S+)$')
  packed[id] = { state = 'pending', priority = priority, after = after, seq = text(tonumber(seq, 16)), made = made, source = source }
  return packed[id]
end

local function unpack_record(id)
  local job = packed[id]
  if not job then return end
  packed[id] = nil
  local definition, user, suffix = parts(id)
  local key = packed_key(definition, suffix)
  create(id, user, job.made, job.priority, job.after, job.seq, job.source, '')
  call('HDEL', key, user)
  if call('EXISTS', key) == 0 then call('SREM', K.planned_suffixes .. definition, suffix) end
end

-- Ids of a user's jobs of a definition that are packed.
local function packed_jobs(user, definition)
  local found = {}
  for _, suffix in ipairs(call('SMEMBERS', K.planned_suffixes .. definition)) do
    local key = packed_key(definition, suffix)
    if call('HEXISTS', key, user) == 1 then found[#found + 1] = definition .. ':' .. user .. ':' .. suffix end
  end
  return found
end

-- State and history ----------------------------------------------------------------------------------------------

-- So many lines of a history are kept at the most. When there are more, those after the first FIRST_LINES and before the last
-- NEWEST_LINES are dropped, all in one, so that it is seldom done, and a line in their place says how many they were.
local MOST_LINES, FIRST_LINES, NEWEST_LINES = 200, 20, 129

local function shorten_history(id)
  local key = K.history .. id
  local lines = call('LRANGE', key, 0, -NEWEST_LINES - 1)
  local last, dropped = cjson.decode(lines[#lines]), #lines - FIRST_LINES
  local before = cjson.decode(lines[FIRST_LINES + 1])[7]
  if type(before) == 'table' and before.dropped then dropped = dropped - 1 + before.dropped end
  call('LTRIM', key, -NEWEST_LINES, -1)
  -- as it was after the last of them
  call('LPUSH', key, '[' .. text(last[1]) .. ',"' .. last[3] .. '","' .. last[3] .. '",' .. last[4] .. ',"","' ..
    dropped .. ' lines were dropped: a history is kept to ' .. MOST_LINES .. '",{"dropped":' .. dropped .. '}]')
  for i = FIRST_LINES, 1, -1 do call('LPUSH', key, lines[i]) end
end

-- A line of a history without its time.
local function line_of(from, to, attempt, worker, reason, detail)
  return ',"' .. from .. '","' .. to .. '",' .. attempt .. ',' .. cjson.encode(worker) .. ',' .. cjson.encode(reason) ..
    (detail ~= '' and (',' .. detail) or '') .. ']'
end

local function remember(id, now, from, to, attempt, worker, reason, detail)
  unpack_record(id)
  local length = call('RPUSH', K.history .. id, '[' .. text(now) .. line_of(from, to, attempt, worker, reason, detail))
  if length > MOST_LINES then shorten_history(id) end
end

-- Adds a line that changes nothing; not where it is the last one already, because the call that brings it was repeated.
local function add_note(id, now, job, worker, reason, detail)
  local last = call('LINDEX', K.history .. id, -1)
  local line = line_of(job.state, job.state, job.attempt, worker, reason, detail)
  if last and string.sub(last, -#line) == line then return false end
  remember(id, now, job.state, job.state, job.attempt, worker, reason, detail)
  return true
end

-- Moves a job from the state it is in to another, and keeps that. An error here is a bug of a script; what was written before
-- it stays written, so a script moves a job first and changes the rest after it.
local function move(id, from, to, now, attempt, worker, reason, detail)
  if not (ALLOWED[from] and ALLOWED[from][to]) then
    error('transition ' .. from .. ' -> ' .. to .. ' of ' .. id .. ' is not allowed')
  end
  unpack_record(id)
  call('HSET', K.job .. id, 'state', to)
  call('HINCRBY', K.counts, to, 1)
  remember(id, now, from, to, attempt, worker, reason, detail)
end

-- Settings that the scripts follow ------------------------------------------------------------------------------

local settings_read = nil
-- fairness: users take turns inside a priority; share: what part of all releases each lower priority gets at least.
local function option(name)
  if not settings_read then settings_read = pairs_to_table(call('HGETALL', K.options)) end
  return settings_read[name]
end

local limits_read = {}

-- The limit in force under a name, or nil.
local function limit_of(name)
  local known = limits_read[name]
  if known == nil then
    local kept = call('HGET', K.limits, name)
    known = false
    if kept then
      local rate, burst, concurrency = string.match(kept, '^(%S+) (%S+) (%S+)$')
      known = { rate = tonumber(rate), burst = tonumber(burst), concurrency = tonumber(concurrency) }
    end
    limits_read[name] = known
  end
  return known or nil
end

local hosts_read = {}
-- The host that a definition's jobs call; '' where it calls none.
local function host_of(definition)
  local host = hosts_read[definition]
  if not host then
    host = call('HGET', K.definition .. definition, 'host') or ''
    hosts_read[definition] = host
  end
  return host
end

-- Hosts that are held back: what their calls say of them, and until when nothing may go to them -----------------

-- A host that is held back has a record: its breaker is open, or it asked for a pause (Retry-After). When that time has passed it is
-- half open, and one job at a time is released to probe it, until enough calls in a row went well. Then the record goes.
--   kind 'open' or 'held'   since   ends: until when   set: when that was decided   openings: failures in a row of the host
--   passed: probes that went well   probe: the delivery that probes it, '' none   probed: when it was released or started as that
--   tried: set of definitions whose probes failed, since all had their turn   others: until when only others may probe it
--   calls, failures: what opened it   why
local breakers_read = {}

local function breaker_of(host)
  local known = breakers_read[host]
  if known == nil then
    local kept = call('HGET', K.breakers, host)
    known = kept and cjson.decode(kept) or false
    breakers_read[host] = known
  end
  return known or nil
end

local function keep_breaker(host, breaker)
  breakers_read[host] = breaker
  call('HSET', K.breakers, host, cjson.encode(breaker))
end

-- Whether a host's lanes may have to stand in line.
local function has_line(host)
  return limit_of('host:' .. host) ~= nil or breaker_of(host) ~= nil
end

-- Waiting set: one lane for each priority and definition, so that a lane that may not go holds back no other -----

-- A lane is blocked until a time, or until
local PAUSED = '+inf'     -- its definition is resumed,
local EVENT = '8e15'      -- a job ends: so many run as may, of the definition or, for a gate, of the host, or one probes it,
local GATED = '9e15'      -- its host lets it go: it stands in line with the host's other lanes.

-- A stage is where lanes lie and the index of those that may go. Jobs wait in WAITING; with fairness those that are due go through
-- TURNS, where the score is not a time but a round.
local WAITING = { lane = K.lane, ready = K.ready, changed = {} }
local TURNS = { lane = K.turn, ready = K.turns, changed = {} }

local function served_stage()
  return option('fairness') and TURNS or WAITING
end

local function head_of(stage, priority, definition)
  return call('ZRANGE', stage.lane .. priority .. ':' .. definition, 0, 0, 'WITHSCORES')
end

-- Notes in the index which lane's head changed, for `first_lane`.
local function show(stage, priority, definition, score)
  local changed = stage.changed[priority]
  if changed then changed[definition] = true end
  if score then
    call('ZADD', stage.ready .. priority, score, definition)
  else
    call('ZREM', stage.ready .. priority, definition)
  end
end

local unblock_lane

-- After the head of a lane changed to `score`, or none can go: a host that may be called lets the first in its line go, if it is due
-- before.
local function pass_on(priority, definition, score)
  local host = host_of(definition)
  if host == '' or not has_line(host) or call('ZSCORE', K.gates, host) then return end
  local first = call('ZRANGE', K.gated .. priority .. ':' .. host, 0, 0, 'WITHSCORES')
  if first[1] and (not score or tonumber(first[2]) < tonumber(score)) then unblock_lane(priority, first[1]) end
end

-- After the lane that release serves changed: it is shown with its head, unless it is blocked.
local function refresh_lane(priority, definition)
  local stage = served_stage()
  local score = head_of(stage, priority, definition)[2]
  local blocked = call('ZSCORE', K.blocked .. priority, definition)
  if not blocked then
    show(stage, priority, definition, score)
    pass_on(priority, definition, score)
  elseif tonumber(blocked) == tonumber(GATED) then
    local host = host_of(definition)
    if score and call('ZSCORE', K.gates, host) then
      call('ZADD', K.gated .. priority .. ':' .. host, score, definition)
    else
      -- nothing waits in it, or the host lets one go just now: release looks which
      call('ZREM', K.gated .. priority .. ':' .. host, definition)
      call('ZREM', K.blocked .. priority, definition)
      show(stage, priority, definition, score)
    end
  end
end

-- After jobs were put into a lane, or taken out of it.
local function lane_changed(priority, definition)
  if option('fairness') then
    show(WAITING, priority, definition, head_of(WAITING, priority, definition)[2])
  else
    refresh_lane(priority, definition)
  end
end

-- A job's number in its lane, where equal times go by it, and in its packed record.
local function seq_digits(seq)
  return string.format('%011x', seq)
end

local function lane_member(seq, id)
  return seq_digits(seq) .. ':' .. id
end

local function wait(id, priority, after, seq)
  local definition = parts(id)
  call('ZADD', K.lane .. priority .. ':' .. definition, text(after), lane_member(seq, id))
  lane_changed(priority, definition)
end

-- A job waits for a span of time, not for an instant: should the clock be set back meanwhile, it shall not wait for longer (reclaim).
local function note_delay(id, now)
  call('ZADD', K.delays, text(now), id)
end

local function end_delay(id)
  call('ZREM', K.delays, id)
end

-- Takes a job that waits out of the waiting set, wherever it waits.
local function unwait(id, job)
  local definition, user = parts(id)
  local priority, member = job.priority, lane_member(tonumber(job.seq), id)
  if call('ZREM', K.lane .. priority .. ':' .. definition, member) == 1 then
    lane_changed(priority, definition)
  elseif call('ZREM', K.turn .. priority .. ':' .. definition, member) == 1 then
    refresh_lane(priority, definition)
  elseif call('SREM', K.held .. user, id) == 0 then
    call('ZREM', K.capped .. priority .. ':' .. user, member)
  end
end

local function leave_gate(priority, definition)
  local blocked = call('ZSCORE', K.blocked .. priority, definition)
  if blocked and tonumber(blocked) == tonumber(GATED) then call('ZREM', K.gated .. priority .. ':' .. host_of(definition), definition) end
end

local function block_lane(priority, definition, untilms)
  leave_gate(priority, definition)
  show(served_stage(), priority, definition, nil)
  call('ZADD', K.blocked .. priority, untilms, definition)
  pass_on(priority, definition)
end

function unblock_lane(priority, definition)
  leave_gate(priority, definition)
  call('ZREM', K.blocked .. priority, definition)
  refresh_lane(priority, definition)
end

-- The same for a lane that waits for a limit or a host, and not for a lane that is paused.
local function unblock_unless_paused(definition)
  for _, priority in ipairs(PRIORITIES) do
    local blocked = call('ZSCORE', K.blocked .. priority, definition)
    if blocked and tonumber(blocked) ~= math.huge then unblock_lane(priority, definition) end
  end
end

-- Puts a lane into the line of its host. Returns whether there is anything in it.
local function gate_lane(priority, definition)
  local score = head_of(served_stage(), priority, definition)[2]
  if not score then return false end
  show(served_stage(), priority, definition, nil)
  call('ZADD', K.blocked .. priority, GATED, definition)
  call('ZADD', K.gated .. priority .. ':' .. host_of(definition), score, definition)
  return true
end

-- Lets the first lane in a host's line go.
local function admit_lane(priority, host)
  local first = call('ZRANGE', K.gated .. priority .. ':' .. host, 0, 0)[1]
  if first then unblock_lane(priority, first) end
end

-- Limits ---------------------------------------------------------------------------------------------------------

local buckets = {}

local function keep_bucket(name, bucket, now)
  call('SET', K.limit .. name, text(now) .. ' ' .. string.format('%.17g', bucket.level) .. ' ' .. bucket.reserved)
end

-- A rate is kept by a token bucket (https://en.wikipedia.org/wiki/Token_bucket). A job reserves a token when it is released and takes
-- it when it starts, so what is counted is the start, whenever that comes: `level - reserved` tokens are free. A call may reach
-- its target SLACK ms after its start was recorded; so much of the burst is kept back, and who is slower asks again (renew). Where
-- the burst is too small for that, each start costs more than one token (model.Limit).
local function bucket_of(name, limit, now)
  local bucket = buckets[name]
  if bucket then return bucket end
  local left = limit.burst - limit.rate * SLACK / 1000
  local cost = 1 + math.max(0, 1 - left)
  local capacity = math.max(cost, left)
  local kept = call('GET', K.limit .. name)
  if kept then
    local at, level, reserved = string.match(kept, '^(%S+) (%S+) (%S+)$')
    level = tonumber(level) + math.max(0, now - tonumber(at)) * limit.rate / 1000
    bucket = { level = math.min(capacity, level), reserved = tonumber(reserved) }
    -- the clock was set back: it fills from now on, not only when that time comes again
    if now < tonumber(at) then keep_bucket(name, bucket, now) end
  else
    bucket = { level = capacity, reserved = 0 }
  end
  bucket.capacity, bucket.cost, bucket.per_ms = capacity, cost, limit.rate / 1000
  buckets[name] = bucket
  return bucket
end

-- In how many ms there is a free token. A full bucket whose tokens are all reserved has one only after a start, which comes soon.
local function wait_for_token(bucket)
  local needed = (bucket.reserved + 1) * bucket.cost
  if needed <= bucket.level then return 0 end
  return math.max((needed - bucket.level) / bucket.per_ms, needed > bucket.capacity and 20 or 0)
end

-- The rates that a definition's jobs are under: limits by name.
local function rates(definition)
  local host, found = host_of(definition), {}
  for _, name in ipairs({ 'total', 'definition:' .. definition, host ~= '' and 'host:' .. host or nil }) do
    local limit = limit_of(name)
    if limit and limit.rate then found[name] = limit end
  end
  return found
end

-- Whether each of them has a token, whoever it is reserved for.
local function have_tokens(definition, now)
  local enough = true
  for name, limit in pairs(rates(definition)) do
    local bucket = bucket_of(name, limit, now)
    enough = enough and bucket.level >= bucket.cost
  end
  return enough
end

-- Changes the bucket of each of them.
local function each_bucket(definition, now, change)
  for name, limit in pairs(rates(definition)) do
    local bucket = bucket_of(name, limit, now)
    change(bucket)
    keep_bucket(name, bucket, now)
  end
end

local function reserve(bucket) bucket.reserved = bucket.reserved + 1 end
local function unreserve(bucket) bucket.reserved = math.max(0, bucket.reserved - 1) end
local function spend(bucket)
  unreserve(bucket)
  bucket.level = bucket.level - bucket.cost
end

-- The limit on a user's jobs in flight: the user's own, or everyone's.
local function user_limit(user)
  return limit_of('user:' .. user) or limit_of('user')
end

-- Names of the concurrency limits that a job is under; the user's is counted under the user's own name.
local function concurrencies(definition, user)
  local names, host = {}, host_of(definition)
  local own, of_host, of_user = limit_of('definition:' .. definition), host ~= '' and limit_of('host:' .. host), user_limit(user)
  if own and own.concurrency then names[#names + 1] = 'definition:' .. definition end
  if of_host and of_host.concurrency then names[#names + 1] = 'host:' .. host end
  if of_user and of_user.concurrency then names[#names + 1] = 'user:' .. user end
  return names
end

local function in_flight(name)
  return tonumber(call('HGET', K.inflight, name) or '0')
end

local function is_full(name, limit)
  return limit and limit.concurrency and in_flight(name) >= limit.concurrency
end

-- Counts again what is released and not ended, for the limit `only` or for all: a limit that is new, or that a definition came
-- under, was not counted before.
local function recount(now, only)
  local flying = call('ZCARD', K.active) + call('HLEN', K.inflight)
  for _, priority in ipairs(PRIORITIES) do flying = flying + call('ZCARD', K.queued .. priority) end
  if flying == 0 then return end
  local reserved, busy = {}, {}
  local function count(id, waits)
    local definition, user = parts(id)
    local host = host_of(definition)
    for _, name in ipairs({ 'total', 'definition:' .. definition, 'host:' .. host, 'user:' .. user }) do
      busy[name] = (busy[name] or 0) + 1
      if waits then reserved[name] = (reserved[name] or 0) + 1 end
    end
  end
  for _, priority in ipairs(PRIORITIES) do
    for _, id in ipairs(call('ZRANGE', K.queued .. priority, 0, -1)) do count(id, true) end
  end
  for _, id in ipairs(call('ZRANGE', K.active, 0, -1)) do count(id, false) end
  local names = only and { only } or call('HKEYS', K.limits)
  local users = false
  for _, name in ipairs(names) do
    local limit = limit_of(name)
    if limit and limit.rate then
      local bucket = bucket_of(name, limit, now)
      bucket.reserved = reserved[name] or 0
      keep_bucket(name, bucket, now)
    end
    if string.sub(name, 1, 4) == 'user' then
      users = true
    elseif limit and limit.concurrency and busy[name] then
      call('HSET', K.inflight, name, busy[name])
    else
      call('HDEL', K.inflight, name)
    end
  end
  if not users then return end
  for _, name in ipairs(call('HKEYS', K.inflight)) do
    if string.sub(name, 1, 5) == 'user:' then call('HDEL', K.inflight, name) end
  end
  for name, jobs in pairs(busy) do
    local user = string.match(name, '^user:(.+)$')
    local limit = user and user_limit(user)
    if limit and limit.concurrency then call('HSET', K.inflight, name, jobs) end
  end
end

-- Release looks which of a host's line may go now. Also where no gate is closed: the lane that might go may be there no more. All
-- may where nothing keeps them in line any more.
local function wake_host(host)
  if has_line(host) then
    call('ZADD', K.gates, 0, host)
    return
  end
  call('ZREM', K.gates, host)
  for _, priority in ipairs(PRIORITIES) do
    for _, definition in ipairs(call('ZRANGE', K.gated .. priority .. ':' .. host, 0, -1)) do unblock_lane(priority, definition) end
  end
end

-- Until when nothing may go to a host, as its gate is closed; nil where something may: anything, or a probe.
local function held_until(host, now)
  local breaker = breaker_of(host)
  if not breaker then return nil end
  if now < breaker.set then
    -- the clock was set back: it is held back for the span that it was to be
    breaker.ends, breaker.set = now + breaker.ends - breaker.set, now
    keep_breaker(host, breaker)
  end
  if now < breaker.ends then return text(breaker.ends) end
  return breaker.probe ~= '' and EVENT or nil
end

-- Whose probe failed lets the host's other definitions probe it for a moment, or one that always fails would keep them all from it.
-- Until when it does, as its lane is blocked by that; nil where it may go. The host is half open and nobody probes it.
local function steps_aside_until(host, definition, now)
  local breaker = breaker_of(host)
  -- what lies further ahead is by a clock that was set back
  local aside = breaker and breaker.tried[definition] and now < breaker.others and breaker.others <= now + PROBE_TURN
  return aside and text(breaker.others) or nil
end

local function set_probe(host, breaker, id, delivery, now)
  breaker.probe, breaker.probed = id .. '#' .. delivery, now
  keep_breaker(host, breaker)
end

-- Whether what probes a host is 'queued' or 'running'; nil where it is over, as one that a worker of another version ended.
local function probe_state(breaker)
  local id, delivery = string.match(breaker.probe, '^(.+)#(%d+)$')
  if not id then return nil end
  local values = call('HMGET', K.job .. id, 'state', 'delivery')
  return values[2] == delivery and (values[1] == 'queued' or values[1] == 'running') and values[1] or nil
end

-- Why a job that was released may not call its host now; nil where it may, and true with that where it is the probe from now on: what
-- comes first to a host that is half open is, and not what was released for that and still lies in a queue, for whose turn nobody can
-- say when it comes.
local function kept_from_host(id, delivery, now)
  local host = host_of((parts(id)))
  local breaker = host ~= '' and breaker_of(host)
  if not breaker then return nil end
  local held = held_until(host, now)
  if not held or held == EVENT then
    if breaker.probe == id .. '#' .. delivery then return nil end
    if probe_state(breaker) ~= 'running' then
      set_probe(host, breaker, id, delivery, now)
      return nil, true
    end
  end
  return 'its host ' .. host .. ' is held back: ' .. breaker.why
end

-- Holds a host back for a span in ms; then it is probed. Returns that in words.
local function hold_host(host, kind, span, why, now)
  local breaker = breaker_of(host) or
    { kind = kind, since = now, openings = 0, probe = '', probed = 0, tried = {}, calls = 0, failures = 0 }
  -- a breaker that is open stays so when the host asks for a pause
  if kind == 'open' then breaker.kind, breaker.openings = kind, breaker.openings + 1 end
  breaker.ends, breaker.set, breaker.passed, breaker.why = now + span, now, 0, why
  breaker.others = breaker.ends + PROBE_TURN
  keep_breaker(host, breaker)
  wake_host(host)
  count(kind == 'open' and 'breaker_opened' or 'host_held')
  return 'host ' .. host .. (kind == 'open' and ': its breaker is open for ' or ': is held back for ') ..
    string.format('%.10g', span / 1000) .. ' s: ' .. why
end

-- A host is not held back any more. What was called before this says nothing about it: that is kept for a day.
local function free_host(host, now)
  local breaker = breaker_of(host)
  local was_open = breaker.kind == 'open'
  breakers_read[host] = false
  call('HDEL', K.breakers, host)
  if was_open then call('SET', K.calls .. host, text(now) .. ' 0 0 0 0 0', 'PX', 86400000) end
  for definition in pairs(breaker.tried) do unblock_unless_paused(definition) end
  wake_host(host)
end

-- The job that probes a host is released no more, however that ended, or calls another host now: the next may go.
local function end_probe(host, breaker)
  breaker.probe = ''
  keep_breaker(host, breaker)
  wake_host(host)
end

local function drop_probe(host, definition)
  local breaker = host ~= '' and breaker_of(host)
  if breaker and parts(breaker.probe) == definition then end_probe(host, breaker) end
end

-- Looks after the hosts that are half open. A probe that has been queued for longer than `patience` may have nobody to take it, and one
-- may be over without a word: the next may go. Who calls a host so seldom that nothing probed it for an hour learns nothing from what was
-- then. Returns whether anything may go now.
local function tend_breakers(now, patience, clock_set)
  local woken = false
  for host in pairs(pairs_to_table(call('HGETALL', K.breakers))) do
    -- should the clock have been set back, its time begins anew with this look
    held_until(host, now)
    local breaker = breaker_of(host)
    if clock_set and breaker.ends < now then
      -- and so does the hour where it was set forward
      breaker.ends, breaker.set = now, now
      keep_breaker(host, breaker)
    end
    if breaker.probe ~= '' then
      local state = probe_state(breaker)
      -- what was released by another clock than this one is given its time from now on
      if state == 'queued' and (clock_set or now < breaker.probed) then
        breaker.probed = now
        keep_breaker(host, breaker)
      elseif not state or (state == 'queued' and breaker.probed + patience <= now) then
        end_probe(host, breaker)
        woken = true
      end
    elseif breaker.ends + 3600000 <= now then
      free_host(host, now)
      woken = true
    end
  end
  return woken
end

-- Counts a call that ended at a host without a record. Counting begins with a failure, so that a host in good health costs one
-- look. Two halves of the window are kept, by the clock: this one and the one before. Returns the calls of both, and failures.
local function count_call(host, failed, started, window, now)
  local kept = call('GET', K.calls .. host)
  if not kept and not failed then return 0, 0 end
  local half, calls, failures, calls_before, failures_before = math.floor(2 * now / window), 0, 0, 0, 0
  local since = 0
  if kept then
    local values = {}
    for value in string.gmatch(kept, '%S+') do values[#values + 1] = tonumber(value) end
    -- where the clock was set back, what it showed before counts no more
    since = values[1] <= now and values[1] or 0
    if values[2] == half then
      calls, failures, calls_before, failures_before = values[3], values[4], values[5], values[6]
    elseif values[2] == half - 1 then
      calls_before, failures_before = values[3], values[4]
    end
  end
  if started < since or (not failed and failures + failures_before == 0) then return 0, 0 end
  calls, failures = calls + 1, failures + (failed and 1 or 0)
  call('SET', K.calls .. host, table.concat({ text(since), text(half), calls, failures, calls_before, failures_before }, ' '),
    'PX', since > 0 and 86400000 or window)
  return calls + calls_before, failures + failures_before
end

-- Takes to account what the call of a run that ends says of its host: 'good', 'bad' or '' nothing, and for how many ms the host
-- asks not to be called (0: it does not). `rule`: "<share of failures> <least calls, 0: no breaker> <window in ms> <pause in ms>".
-- Of a host that is held back only its probe says whether it is well: what else ends began before. `called` is the host that the
-- worker called: a definition may call another one since. Returns what became of the host, in words, or ''.
local function report_call(id, job, called, verdict, hold, rule, reason, now)
  local definition = parts(id)
  local host = host_of(definition)
  if verdict == '' or host == '' or host ~= called then return '' end
  local share, least, window, pause = string.match(rule, '^(%S+) (%S+) (%S+) (%S+)$')
  share, least, window, pause = tonumber(share), tonumber(least), tonumber(window), tonumber(pause)
  local failed, breaker = verdict == 'bad', breaker_of(host)
  if not breaker then
    local calls, failures = 0, 0
    if least > 0 then calls, failures = count_call(host, failed, tonumber(job.started), window, now) end
    if failed and least > 0 and calls >= least and failures >= share * calls then
      call('DEL', K.calls .. host)
      local said = hold_host(host, 'open', math.max(pause, hold), failures .. ' of ' .. calls .. ' calls failed, the last: ' .. reason, now)
      breaker = breaker_of(host)
      breaker.calls, breaker.failures = calls, failures
      keep_breaker(host, breaker)
      return said
    end
    return hold > 0 and hold_host(host, 'held', hold, reason, now) or ''
  end
  if held_until(host, now) ~= EVENT or breaker.probe ~= id .. '#' .. job.delivery then
    return hold > 0 and now + hold > breaker.ends and hold_host(host, 'held', hold, reason, now) or ''
  end
  if failed then
    breaker.tried[definition] = true
    if least == 0 then return hold_host(host, 'held', hold > 0 and hold or pause, reason, now) end
    if hold > 0 and breaker.kind == 'held' then return hold_host(host, 'held', hold, reason, now) end
    -- each time twice as long, up to LONGEST_PAUSE times
    local span = math.max(hold, pause * math.min(LONGEST_PAUSE, 2 ^ breaker.openings))
    return hold_host(host, 'open', span, 'a probe failed: ' .. reason, now)
  end
  breaker.passed, breaker.others = breaker.passed + 1, now + PROBE_TURN
  keep_breaker(host, breaker)
  if least > 0 and breaker.kind == 'open' and breaker.passed < PROBES then return '' end
  if breaker.kind == 'open' then count('breaker_closed') end
  free_host(host, now)
  return 'host ' .. host .. ': is well again and held back no more'
end

-- What waits for an end of a definition's jobs, or its host's, may be looked at again; with `freed`, because a token came back
-- unused, also what waits for a time.
local function wake(definition, freed)
  if limit_of('definition:' .. definition) then
    for _, priority in ipairs(PRIORITIES) do
      local blocked = tonumber(call('ZSCORE', K.blocked .. priority, definition) or math.huge)
      if blocked == tonumber(EVENT) or (freed and blocked < tonumber(EVENT)) then unblock_lane(priority, definition) end
    end
  end
  local host = host_of(definition)
  if host ~= '' and has_line(host) then
    local gate = tonumber(call('ZSCORE', K.gates, host) or math.huge)
    if gate == tonumber(EVENT) or (freed and gate < tonumber(EVENT)) then wake_host(host) end
  end
end

local load_job, follow_definition

-- Puts back into their lanes what was set aside for a user's cap: as much as the cap lets go, and what stands before it in lanes
-- that are blocked, because it can wait there and must not hold back the user's other jobs. Returns how many.
local function uncap(user, most, now)
  local limit = user_limit(user)
  local room = limit and limit.concurrency and limit.concurrency - in_flight('user:' .. user) or math.huge
  local back, left = 0, 0
  for _, priority in ipairs(PRIORITIES) do
    local key = K.capped .. priority .. ':' .. user
    for _, member in ipairs(room > 0 and most > back and call('ZRANGE', key, 0, most - back - 1) or {}) do
      if room <= 0 then break end
      local id = string.sub(member, 13)
      local definition, job = parts(id), load_job(id)
      call('ZREM', key, member)
      if job then
        follow_definition(id, job, now)
        wait(id, job.priority, tonumber(job.after), tonumber(job.seq))
      end
      back = back + 1
      if not call('ZSCORE', K.blocked .. priority, definition) and not call('ZSCORE', K.gates, host_of(definition)) then room = room - 1 end
    end
    left = left + call('ZCARD', key)
  end
  if left == 0 then call('SREM', K.capped_users, user) end
  return back
end

-- A job is released: it counts in its limits.
local function enter_flight(definition, user, now)
  each_bucket(definition, now, reserve)
  for _, name in ipairs(concurrencies(definition, user)) do call('HINCRBY', K.inflight, name, 1) end
end

-- A job that was queued or running is so no more.
local function leave_flight(id, job, now)
  local definition, user = parts(id)
  if job.state == 'running' then
    call('ZREM', K.active, id)
    call('SREM', K.worker_jobs .. job.worker, id)
  else
    call('ZREM', K.queued .. (job.queue or job.priority), id)
    each_bucket(definition, now, unreserve)
  end
  local host = host_of(definition)
  local breaker = host ~= '' and breaker_of(host)
  if breaker and breaker.probe == id .. '#' .. job.delivery then end_probe(host, breaker) end
  for _, name in ipairs(concurrencies(definition, user)) do
    if call('HINCRBY', K.inflight, name, -1) <= 0 then call('HDEL', K.inflight, name) end
  end
  wake(definition, job.state ~= 'running')
  if call('SISMEMBER', K.capped_users, user) == 1 then uncap(user, 100, now) end
end

-- What a limit is now follows from what was set live, else from what is configured. Applies a change at once. Returns 1, or 0.
local function set_limit(name, layer, value, now)
  if value == '' then call('HDEL', layer, name) else call('HSET', layer, name, value) end
  local before = call('HGET', K.limits, name)
  local after = call('HGET', K.limits_live, name) or call('HGET', K.limits_configured, name)
  if before == after then return 0 end
  local old = limit_of(name)
  -- what the bucket holds by the old rate
  local level = old and old.rate and bucket_of(name, old, now).level
  limits_read[name], buckets[name] = nil, nil
  if after then call('HSET', K.limits, name, after) else call('HDEL', K.limits, name) end
  local new = limit_of(name)
  if new and new.rate then
    local bucket = bucket_of(name, new, now)
    bucket.level = math.min(level or bucket.level, bucket.capacity)
    keep_bucket(name, bucket, now)
  else
    call('DEL', K.limit .. name)
  end
  recount(now, name)
  local kind, of = string.match(name, '^(%a+):(.+)$')
  if kind == 'definition' then
    unblock_unless_paused(of)
  elseif kind == 'host' then
    wake_host(of)
  end
  return 1
end

-- Jobs -----------------------------------------------------------------------------------------------------------

function load_job(id)
  local list = call('HGETALL', K.job .. id)
  local job = #list > 0 and pairs_to_table(list) or load_packed(id)
  if not job then return nil end
  job.attempt = tonumber(job.attempt or '0')
  job.delivery = tonumber(job.delivery or '0')
  job.losses = tonumber(job.losses or '0')
  return job
end

-- Whether a worker speaks of the run that counts. Two can have messages of one delivery, where a connection was cut and the message put
-- back: one of them started it. And a server that lost its last second may give a delivery again, under the same number.
local function is_run(job, delivery, worker)
  return job.state == 'running' and job.delivery == delivery and job.worker == worker
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

-- What backfills share. `verdict`: whether a subscriber of a group is to have a job of an occurrence: 'make' and the own parameters,
-- or why not: 'exists', 'paused', 'disabled', or 'elsewhere' for who is not (or no more) in that group.
local backfills = {}

function backfills.verdict(user, definition, gid, at)
  local values = call('HMGET', K.user .. user, '@paused', definition)
  local raw, params, group = values[2], '', definition
  if not raw then return 'elsewhere' end
  local off, paused = nil, values[1] == '1'
  -- most subscriptions are plain: {"since":…}
  if not string.find(raw, '^{"since":%d+}$') then
    local readable, subscription = pcall(cjson.decode, raw)
    if not readable then return 'disabled' end
    group, params, off = subscription.group or definition, subscription.params or '', subscription.off
    paused = paused or subscription.paused
  end
  if group ~= gid then return 'elsewhere' end
  -- every job that exists is among those of its definition
  if call('ZSCORE', K.definition_jobs .. definition, definition .. ':' .. user .. ':' .. at) then return 'exists' end
  if off then return 'disabled' end
  if paused then return 'paused' end
  return 'make', params
end

-- A job that a backfill made has ended as `state`, or with -1 for `by` it goes on after that end. A record that is gone stays so.
function backfills.count(id, job, state, by)
  local key = K.backfill .. job.backfill
  if call('EXISTS', key) == 0 then return end
  if by > 0 then
    call('ZREM', K.backfill_jobs .. job.backfill, id)
  else
    call('ZADD', K.backfill_jobs .. job.backfill, job.made, id)
  end
  call('HINCRBY', key, state, by)
end

-- Ends a backfill for good.
function backfills.close(id, state, reason, now)
  call('HSET', K.backfill .. id, 'state', state, 'reason', reason, 'ended', text(now))
  call('HDEL', K.backfill .. id, 'held', 'waits_for')
  call('ZADD', K.backfills_ended, text(now), id)
  call('ZREM', K.due, 'b|' .. id)
  call('DEL', K.backfill_users .. id)
end

-- Ends a job: a terminal transition and all that follows from it. `counted`: it is a run's own end, which `observe_run` counts.
local function conclude(id, job, to, now, worker, reason, detail, counted)
  move(id, job.state, to, now, job.attempt, worker, reason, detail)
  if job.state == 'running' or job.state == 'queued' then
    leave_flight(id, job, now)
  else
    unwait(id, job)
    end_delay(id)
  end
  if to == 'failed' or to == 'timed_out' or string.sub(reason, 1, #POISON) == POISON then
    -- a dead letter: kept, with why, until it is redriven or discarded, or its own retention passes
    call('HSET', K.job .. id, 'finished', text(now), 'died', reason)
    call('ZADD', K.dead, text(now), id)
    count('dead_letters')
    if string.sub(reason, 1, #POISON) == POISON then count('poison_pills') end
  else
    call('HSET', K.job .. id, 'finished', text(now))
    call('ZADD', K.finished, text(now), id)
  end
  count_unfinished(id, -1)
  if not counted then tally(parts(id), job.priority .. '|' .. to, 1) end
  if job.backfill then backfills.count(id, job, to, 1) end
  job.state = to
end

-- Gives a job that is nowhere in the waiting set another priority.
local function change_priority(id, job, priority, now, reason)
  remember(id, now, job.state, job.state, job.attempt, '', reason, '')
  call('HSET', K.job .. id, 'priority', priority)
  job.priority = priority
end

-- The same where its definition's changed meanwhile, unless it was given one of its own.
function follow_definition(id, job, now)
  local priority = job.own ~= '1' and call('HGET', K.definition .. parts(id), 'priority')
  if priority and priority ~= job.priority then
    change_priority(id, job, priority, now, 'priority ' .. priority .. ', as its definition has it')
  end
end

-- Puts a job that is queued or running back into the waiting set.
local function give_back(id, job, to, now, after, worker, reason, detail)
  move(id, job.state, to, now, job.attempt, worker, reason, detail)
  leave_flight(id, job, now)
  job.state = to
  local seq = job.seq
  if after > tonumber(job.after) then seq = call('INCR', K.seq) end
  call('HSET', K.job .. id, 'after', text(after), 'seq', seq)
  follow_definition(id, job, now)
  wait(id, job.priority, after, tonumber(seq))
  if after ~= tonumber(job.after) and after > now then note_delay(id, now) end
end

-- The job of a delivery, given as <job id>#<delivery>, if that is its current one.
local function held_job(tag)
  local id, delivery = string.match(tag, '^(.+)#(%d+)$')
  local job = id and load_job(id)
  if job and job.delivery == tonumber(delivery) then return id, job end
end

-- A worker that stops gives back a job that it took and has not started, and one whose run it broke off. Returns 1, or 0 where that is
-- not so.
local function hand_back(id, job, now, worker, also_running)
  if job.state == 'queued' then
    local to = job.attempt > 0 and 'retrying' or 'pending'
    give_back(id, job, to, now, tonumber(job.after), worker, 'worker ' .. worker .. ' stops: not started', '')
    return 1
  elseif also_running and job.state == 'running' and job.worker == worker then
    give_back(id, job, 'retrying', now, tonumber(job.after), worker, 'worker ' .. worker .. ' stopped', '')
    -- the run that was broken off does not use up the job's budget
    call('HSET', K.job .. id, 'budget', tonumber(job.budget or '0') + 1)
    return 1
  end
  return 0
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
  local wait_ms = backoff * 2 ^ (losses - 1)
  if losses >= most_losses then
    conclude(id, job, ran and 'failed' or 'rejected', now, worker, POISON .. ': ' .. what .. ', ' .. losses .. ' losses in all', '')
  else
    give_back(id, job, 'retrying', now, now + wait_ms, worker, what .. '; again in ' .. string.format('%g', wait_ms / 1000) .. ' s', '')
  end
  call('HSET', K.job .. id, 'losses', losses)
  if ran then
    call('HSET', K.job .. id, 'budget', tonumber(job.budget or '0') + 1)
    tally(parts(id), 'lost', 1)
  end
  drop_unacked(id, job)
end

-- Release --------------------------------------------------------------------------------------------------------

local function fill(template, values)
  return (string.gsub(template, '@@(%u+)@@', values))
end

-- Of the lanes whose heads have the first place, due by `now`, the one whose head was submitted first. Which heads share that place
-- is kept from one call to the next, between which `show` notes what changed: there can be one for each definition.
local function first_lane(stage, priority, now, ties)
  local ready = stage.ready .. priority
  local head = call('ZRANGE', ready, 0, 0, 'WITHSCORES')
  if not head[1] or tonumber(head[2]) > now then return nil end
  local changed = stage.changed[priority]
  if not changed or ties.score ~= head[2] then
    ties.score, ties.heads, changed = head[2], {}, {}
    for _, definition in ipairs(call('ZRANGEBYSCORE', ready, head[2], head[2])) do changed[definition] = true end
  end
  for definition in pairs(changed) do
    local tied = call('ZSCORE', ready, definition) == head[2]
    ties.heads[definition] = tied and head_of(stage, priority, definition)[1] or nil
  end
  stage.changed[priority] = {}
  local best, best_member = nil, nil
  for definition, member in pairs(ties.heads) do
    if not best or member < best_member then best, best_member = definition, member end
  end
  -- whatever showed an empty lane: it must not stand before the others for ever
  if not best then call('ZREMRANGEBYSCORE', ready, head[2], head[2]) end
  return best, best_member
end

local function subscription_paused(user, definition)
  local values = call('HMGET', K.user .. user, '@paused', definition)
  if values[1] == '1' then return 'user paused' end
  if values[2] and string.find(values[2], '"paused":1', 1, true) then return 'subscription paused' end
  return nil
end

-- With fairness: gives each job that came due its turn: a round later than its user's last one, and not before the round that is
-- being served (start-time fair queueing, Goyal, Vin and Cheng 1996, with jobs of equal cost).
local function take_turns(priority, now, most)
  local ties, current = {}, nil
  for _ = 1, most do
    local definition, member = first_lane(WAITING, priority, now, ties)
    if not definition then break end
    if not current then
      current = tonumber(call('HGET', K.round, priority) or '0')
      call('ZREMRANGEBYSCORE', K.rounds .. priority, '-inf', current)
    end
    local _, user = parts(string.sub(member, 13))
    local turn = math.max(current, tonumber(call('ZSCORE', K.rounds .. priority, user) or '0')) + 1
    call('ZADD', K.rounds .. priority, turn, user)
    call('ZREM', K.lane .. priority .. ':' .. definition, member)
    show(WAITING, priority, definition, head_of(WAITING, priority, definition)[2])
    call('ZADD', K.turn .. priority .. ':' .. definition, turn, member)
    refresh_lane(priority, definition)
  end
end

local function has_due(stage, priority, now)
  local head = call('ZRANGE', stage.ready .. priority, 0, 0, 'WITHSCORES')
  return head[1] and (stage == TURNS or tonumber(head[2]) <= now)
end

-- With a guaranteed share: the highest of the priorities below `priority` that is owed a job and has one.
local function owed(priority, stage, now)
  local below = false
  for _, lower in ipairs(PRIORITIES) do
    if below and tonumber(call('HGET', K.shares, lower) or '0') >= 1 and has_due(stage, lower, now) then return lower end
    below = below or lower == priority
  end
  return nil
end

-- Counts a release of `priority` for the shares: the lower ones that wait are owed a part of it. Nobody saves up while idle.
local function count_share(priority, stage, now, share)
  for number, other in ipairs(PRIORITIES) do
    if number > 1 then
      local credit = has_due(stage, other, now) and tonumber(call('HGET', K.shares, other) or '0') + share or 0
      if other == priority then credit = math.max(0, credit - 1) end
      call('HSET', K.shares, other, string.format('%.17g', math.min(2, credit)))
    end
  end
end

-- Until when a limit lets nothing more go, as a lane is blocked by it; nil where it lets one go now.
local function waits_until(name, now)
  local limit = limit_of(name)
  if is_full(name, limit) then return EVENT end
  local delay = limit and limit.rate and wait_for_token(bucket_of(name, limit, now)) or 0
  return delay > 0 and string.format('%.3f', now + delay) or nil
end

-- What keeps the job at the head of a lane from going: nil, or what was done about it.
--   'gone'    it waits there no more
--   'blocked' its lane or its host's lanes wait
--   'total'   nothing may go; then the ms until something may
local function hold_back(id, member, job, priority, definition, user, now)
  local stage = served_stage()
  local function take_out()
    call('ZREM', stage.lane .. priority .. ':' .. definition, member)
    refresh_lane(priority, definition)
  end
  local why = subscription_paused(user, definition)
  if why then
    take_out()
    call('SADD', K.held .. user, id)
    remember(id, now, job.state, job.state, job.attempt, '', 'held: ' .. why, '')
    return 'gone'
  end
  if is_full('user:' .. user, user_limit(user)) then
    take_out()
    call('ZADD', K.capped .. priority .. ':' .. user, job.after, member)
    call('SADD', K.capped_users, user)
    return 'gone'
  end
  local total = limit_of('total')
  if total and total.rate then
    local delay = wait_for_token(bucket_of('total', total, now))
    if delay > 0 then return 'total', delay end
  end
  local lane_waits = waits_until('definition:' .. definition, now)
  if lane_waits then
    block_lane(priority, definition, lane_waits)
    return 'blocked'
  end
  local host = host_of(definition)
  local host_waits = host ~= '' and (held_until(host, now) or waits_until('host:' .. host, now))
  if host_waits then
    call('ZADD', K.gates, host_waits, host)
    gate_lane(priority, definition)
    return 'blocked'
  end
  local aside = host ~= '' and steps_aside_until(host, definition, now)
  if aside then
    block_lane(priority, definition, aside)
    return 'blocked'
  end
  return nil
end

-- Hands a job over to a broker queue.
local function hand_over(id, member, job, priority, definition, user, queue, message, now)
  local stage = served_stage()
  if stage == TURNS then
    local turn = tonumber(call('ZSCORE', K.turn .. priority .. ':' .. definition, member))
    if turn > tonumber(call('HGET', K.round, priority) or '0') then call('HSET', K.round, priority, turn) end
  end
  call('ZREM', stage.lane .. priority .. ':' .. definition, member)
  local host = host_of(definition)
  local line = host ~= '' and call('EXISTS', K.gated .. priority .. ':' .. host) == 1
  if line and gate_lane(priority, definition) then
    -- others stand in the host's line: this lane goes behind those whose jobs are due before its next
    admit_lane(priority, host)
  else
    refresh_lane(priority, definition)
  end
  local delivery = job.delivery + 1
  end_delay(id)
  local why = queue == priority and 'released' or 'released for its share'
  local breaker = host ~= '' and breaker_of(host)
  if breaker then
    why = why .. ', to probe its host'
    -- the others have had their turn
    if breaker.tried[definition] then breaker.tried = {} end
    set_probe(host, breaker, id, delivery, now)
  end
  move(id, job.state, 'queued', now, job.attempt, '', why, '')
  call('HSET', K.job .. id, 'delivery', delivery)
  if queue ~= priority then
    call('HSET', K.job .. id, 'queue', queue)
  elseif job.queue then
    call('HDEL', K.job .. id, 'queue')
  end
  enter_flight(definition, user, now)
  call('ZADD', K.queued .. queue, text(now), id)
  call('LPUSH', queue, fill(message, { ID = id, USER = user, DELIVERY = tostring(delivery), RETRIES = tostring(job.attempt), QUEUE = queue }))
end

-- Lets go what waited until now.
local function open_gates(now)
  for _, priority in ipairs(PRIORITIES) do
    for _, definition in ipairs(call('ZRANGEBYSCORE', K.blocked .. priority, '-inf', text(now))) do
      unblock_lane(priority, definition)
    end
  end
  for _, host in ipairs(call('ZRANGEBYSCORE', K.gates, '-inf', text(now))) do
    call('ZREM', K.gates, host)
    for _, priority in ipairs(PRIORITIES) do admit_lane(priority, host) end
  end
end

-- Moves due jobs to their broker queues, in strict priority, first come first served inside it (or by turns of the users, or with
-- a share for the lower ones), within the limits and the queues' depth. Returns how many, and when the next could go
-- (nil: nothing waits for a known time).
local function release(now, most)
  local released, looked, messages, in_queue = 0, 0, {}, {}
  local capacity = pairs_to_table(call('HGETALL', K.capacity))
  local stage, share = served_stage(), tonumber(option('share') or '0')
  local due = stage == TURNS and math.huge or now
  local ties = {}
  local next_at = nil
  local function later(at)
    if at and (not next_at or at < next_at) then next_at = at end
  end
  open_gates(now)
  for _, priority in ipairs(PRIORITIES) do
    if stage == TURNS then take_turns(priority, now, 2 * most) end
    ties[priority] = {}
  end
  for _, queue in ipairs(PRIORITIES) do
    in_queue[queue] = call('ZCARD', K.queued .. queue)
    local depth, before = tonumber(capacity[queue] or '0'), 0
    for _, higher in ipairs(PRIORITIES) do
      if higher == queue then break end
      before = before + in_queue[higher] * tonumber(capacity[higher .. '>' .. queue] or '0')
    end
    while before + in_queue[queue] < depth do
      local priority = share > 0 and owed(queue, stage, now) or queue
      local definition, member = first_lane(stage, priority, due, ties[priority])
      if not definition then break end
      looked = looked + 1
      if looked > most then return released, now end
      local id = string.sub(member, 13)
      local message = messages[definition]
      if message == nil then
        message = call('HGET', K.definition .. definition, 'message')
        messages[definition] = message
      end
      local job = load_job(id)
      local _, user = parts(id)
      if not job then
        call('ZREM', stage.lane .. priority .. ':' .. definition, member)
        refresh_lane(priority, definition)
      elseif not message then
        conclude(id, job, 'rejected', now, '', 'definition ' .. definition .. ' does not exist any more', '')
      else
        local what, delay = hold_back(id, member, job, priority, definition, user, now)
        if what == 'total' then
          later(now + delay)
          return released, next_at
        elseif not what then
          hand_over(id, member, job, priority, definition, user, queue, message, now)
          released = released + 1
          in_queue[queue] = in_queue[queue] + 1
          if share > 0 then count_share(priority, stage, now, share) end
        end
      end
    end
    local full = before + in_queue[queue] >= depth
    local head = call('ZRANGE', K.ready .. queue, 0, 0, 'WITHSCORES')
    if head[1] and (not full or tonumber(head[2]) > now) then later(tonumber(head[2])) end
    local blocked = call('ZRANGE', K.blocked .. queue, 0, 0, 'WITHSCORES')
    if blocked[1] and tonumber(blocked[2]) < tonumber(EVENT) then later(tonumber(blocked[2])) end
    -- starts make room and release again; until when a rate holds the rest back then, only another look tells
    local first = full and call('ZRANGE', stage.ready .. queue, 0, 0)[1]
    if first and next(rates(first)) then later(now + 25) end
  end
  local gate = call('ZRANGE', K.gates, 0, 0, 'WITHSCORES')
  if gate[1] and tonumber(gate[2]) < tonumber(EVENT) then later(tonumber(gate[2])) end
  return released, next_at
end

-- Occurrences ----------------------------------------------------------------------------------------------------

-- Opens an occurrence whose record is there: when the planner looks at it, and what limits must carry until its window ends.
-- It is `extra` ms longer or later than it would be without limits.
local function open_occurrence(oid, gid, due, base, window, extra)
  call('SADD', K.open .. gid, oid)
  call('ZADD', K.due, due, 'o|' .. oid)
  call('HSET', K.committed, oid, base .. ' ' .. window .. ' ' .. call('ZCARD', K.slots .. gid))
  if extra > 0 then
    call('HINCRBY', K.planner, 'widened', 1)
    call('HINCRBY', K.planner, 'widened_ms', text(extra))
  end
end

-- An open occurrence's window begins at another time than it did.
local function move_window(oid, base, window, now)
  call('HSET', K.occurrence .. oid, 'base', base, 'moved', text(now))
  local jobs = string.match(call('HGET', K.committed, oid) or '', '%d+$')
  if jobs then call('HSET', K.committed, oid, base .. ' ' .. window .. ' ' .. jobs) end
end

-- Forgetting -----------------------------------------------------------------------------------------------------

local function forget_job(id)
  local definition, user = parts(id)
  call('DEL', K.job .. id, K.history .. id)
  call('ZREM', K.user_jobs .. user, id)
  call('ZREM', K.definition_jobs .. definition, id)
  call('ZREM', K.finished, id)
  call('ZREM', K.dead, id)
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

-- Tells a worker to stop a run that does not count any more, if it can; `why` is '' for a job that was canceled. Should the worker
-- never come back, that is forgotten after a day.
local function tell_to_stop(worker, id, delivery, why)
  call('HSET', K.stops .. worker, id .. '#' .. delivery, why)
  call('EXPIRE', K.stops .. worker, 86400)
end

local function forget_worker(worker)
  call('ZREM', K.workers, worker)
  call('DEL', K.worker .. worker, K.worker_jobs .. worker)
  count_capacity()
end

-- Subscriptions --------------------------------------------------------------------------------------------------

-- Forgets a group that nobody is in; who joins it makes it anew. Returns whether it was so.
local function drop_empty_group(definition, gid)
  if call('EXISTS', K.slots .. gid) == 1 then return false end
  call('DEL', K.group .. gid)
  call('SREM', K.groups .. definition, gid)
  call('ZREM', K.due, 'g|' .. gid)
  return true
end

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
    call('ZADD', K.due, 0, 'g|' .. gid)
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
  local function leave(gid)
    call('ZREM', K.slots .. gid, user)
    drop_empty_group(definition, gid)
  end
  leave(subscription.group or definition)
  for _, before in ipairs(subscription.prev or {}) do leave(before[1]) end
end

-- Cancels the planned jobs of a subscription that have not started; what was submitted by hand stays.
local function cancel_waiting(user, definition, now, reason)
  local canceled, ids = 0, packed_jobs(user, definition)
  for _, id in ipairs(call('ZRANGE', K.user_jobs .. user, 0, -1)) do
    if parts(id) == definition and not call('ZSCORE', K.finished, id) and not call('ZSCORE', K.dead, id) then ids[#ids + 1] = id end
  end
  for _, id in ipairs(ids) do
    local job = load_job(id)
    if job and job.source ~= 'api' and (job.state == 'pending' or job.state == 'queued' or job.state == 'retrying') then
      conclude(id, job, 'canceled', now, '', reason, '')
      canceled = canceled + 1
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
      follow_definition(id, job, now)
      wait(id, job.priority, tonumber(job.after), tonumber(job.seq))
    end
  end
  release(now, 100)
end
