-- Pauses one subscription: nothing is planned or released for it; or resumes it.
-- ARGV[1] now   ARGV[2] user   ARGV[3] definition   ARGV[4] 1 pauses, 0 resumes   ARGV[5] actor   ARGV[6] size of the change log
-- Returns 1 when that changed something, 0 when it was so already, -1 unknown user, -2 not subscribed.

local now, user, definition, pause = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] == '1'
local key = K.user .. user
if call('EXISTS', key) == 0 then return -1 end
local raw = call('HGET', key, definition)
if not raw then return -2 end
local subscription = cjson.decode(raw)
if (subscription.paused ~= nil) == pause then return 0 end
subscription.paused = pause and 1 or nil
call('HSET', key, definition, encode_subscription(subscription))
trail.add(K.trail .. user, definition, now, pause or subscription.off ~= nil, false, { k = pause and 'paused' or 'resumed', b = ARGV[5] })
if not pause then unhold(user, now) end
log_change(now, ARGV[6], ARGV[5], pause and 'subscription paused' or 'subscription resumed', user .. ' ' .. definition, '')
return 1
