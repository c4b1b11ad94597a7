-- Pauses a user: nothing is planned or released for them; or resumes.
-- ARGV[1] now   ARGV[2] user   ARGV[3] 1 pauses, 0 resumes   ARGV[4] actor   ARGV[5] size of the change log
-- Returns 1 when that changed something, 0 when it was so already, -1 when there is no such user.

local now, user, pause = clock(ARGV[1]), ARGV[2], ARGV[3]
local key = K.user .. user
if call('EXISTS', key) == 0 then return -1 end
if (call('HGET', key, '@paused') or '0') == pause then return 0 end
if pause == '1' then
  call('HSET', key, '@paused', '1')
else
  call('HDEL', key, '@paused')
end
trail.add(K.trail .. user, '@', now, pause == '1', false, { k = pause == '1' and 'paused' or 'resumed', b = ARGV[4] })
if pause == '0' then unhold(user, now) end
log_change(now, ARGV[5], ARGV[4], pause == '1' and 'user paused' or 'user resumed', user, '')
return 1
