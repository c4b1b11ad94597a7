-- Subscribes users to definitions, or changes how they are: any number in one go, each on its own.
-- A new or changed schedule takes effect after the planning horizon: every moment up to then belongs to what was before,
-- every later one to what is now, so that a change loses and doubles nothing.
-- ARGV[1] now   ARGV[2] horizon in ms   ARGV[3] actor   ARGV[4] size of the change log ('' logs nothing)
-- ARGV[5…] by sevens: user, definition, slot, <gid>, schedule of an own group ('' the default),
-- params as JSON ('' none, 'keep' as they are), 'on', 'off' or 'keep'
-- Returns for each 1 when created, 2 when changed, 0 when it was so already, -1 unknown user, -2 unknown definition.

local now, actor, size = clock(ARGV[1]), ARGV[3], ARGV[4]
local horizon = math.max(tonumber(ARGV[2]), tonumber(call('HGET', K.planner, 'horizon') or '0'))
local since = math.max(now + horizon, tonumber(call('HGET', K.planner, 'reach') or '0'))
local answers = {}

local function was_in(prev, gid)
  for _, one in ipairs(prev) do
    if one[1] == gid then return true end
  end
  return false
end

for i = 5, #ARGV, 7 do
  local user, definition, slot, gid, schedule, params, enabled = unpack(ARGV, i, i + 6)
  local key = K.user .. user
  local answer
  if call('EXISTS', key) == 0 then
    answer = -1
  elseif call('EXISTS', K.definition .. definition) == 0 then
    answer = -2
  else
    local raw = call('HGET', key, definition)
    local subscription, before
    local was_since, was_off, was_schedule
    if raw then
      subscription = cjson.decode(raw)
      before = subscription.group or definition
      was_since, was_off = subscription.since, subscription.off
      if gid == 'keep' then gid = before end
      was_schedule = before ~= gid and before ~= definition and call('HGET', K.group .. before, 'schedule') or nil
      if before ~= gid then
        local prev = subscription.prev or {}
        if subscription.since < since then
          prev[#prev + 1] = { before, subscription.since, since }
          subscription.prev = prev
          subscription.since = since
        elseif not was_in(prev, before) then
          -- it was never in force
          call('ZREM', K.slots .. before, user)
          drop_empty_group(definition, before)
        end
      end
      if enabled == 'off' then
        subscription.off = 1
      elseif enabled == 'on' and subscription.off then
        subscription.off = nil
        subscription.since = math.max(subscription.since, since)
      end
    else
      if gid == 'keep' then gid = definition end
      subscription = { since = since, off = enabled == 'off' and 1 or nil }
    end
    subscription.group = gid ~= definition and gid or nil
    if params == '' then
      subscription.params = nil
    elseif params ~= 'keep' then
      -- kept as text: a JSON round trip through Lua would turn [] into {} and cut numbers
      subscription.params = params
    end
    local encoded = encode_subscription(subscription)
    if raw == encoded then
      answer = 0
    else
      answer = raw and 2 or 1
      call('HSET', key, definition, encoded)
      if not raw then call('HINCRBY', K.subscribers, definition, 1) end
      if before ~= gid then join_group(user, definition, gid, schedule, slot, now, horizon, since) end
      if not raw then
        -- a first subscription says itself since when it is; one that comes after another must be told from it
        trail.follow_up(K.trail .. user, definition, now, false, { k = 'subscribed', b = actor, f = subscription.since })
      else
        local entries = {}
        if before ~= gid then
          entries[1] = { k = 'schedule', b = actor, g = before, s = was_since, c = was_schedule, f = subscription.since }
        end
        if was_off ~= subscription.off then
          entries[#entries + 1] = { k = subscription.off and 'disabled' or 'enabled', b = actor, f = subscription.since, s = was_since }
        end
        local unusual = subscription.off ~= nil or subscription.paused ~= nil
        if #entries > 0 then trail.add(K.trail .. user, definition, now, unusual, false, unpack(entries)) end
      end
      if enabled == 'off' and raw then cancel_waiting(user, definition, now, 'subscription disabled by ' .. actor) end
      if size ~= '' then
        log_change(now, size, actor, raw and 'subscription changed' or 'subscribed', user .. ' ' .. definition,
          (subscription.off and 'disabled, ' or 'enabled, ') .. (gid == definition and 'schedule of the definition' or 'own schedule ' .. call('HGET', K.group .. gid, 'schedule'))
            .. (params ~= 'keep' and params ~= '' and ', own parameters' or ''))
      end
    end
  end
  answers[#answers + 1] = answer
end
return answers
