-- Ends a subscription and cancels what waits of it.
-- ARGV[1] now   ARGV[2] user   ARGV[3] definition   ARGV[4] actor   ARGV[5] size of the change log
-- Returns how many waiting jobs were canceled, -1 unknown user, -2 not subscribed.

local now, user, definition = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = K.user .. user
if call('EXISTS', key) == 0 then return -1 end
local raw = call('HGET', key, definition)
if not raw then return -2 end
local subscription = cjson.decode(raw)
local schedule = subscription.group and call('HGET', K.group .. subscription.group, 'schedule') or nil
leave_groups(user, definition, subscription)
call('HDEL', key, definition)
trail.add(K.trail .. user, definition, now, false, false,
  { k = 'unsubscribed', b = ARGV[4], g = subscription.group or definition, s = subscription.since, c = schedule })
local canceled = cancel_waiting(user, definition, now, 'unsubscribed by ' .. ARGV[4])
-- a pause of the subscription ends with it; what was submitted by hand may have been held for that
unhold(user, now)
log_change(now, ARGV[5], ARGV[4], 'unsubscribed', user .. ' ' .. definition, '')
return canceled
