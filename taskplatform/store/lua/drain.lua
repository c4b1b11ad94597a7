-- Lets a worker take nothing new, or again. It hears of it with its next heartbeat; nothing more is released for it from now on.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] 1: it takes nothing new, 0: it does again   ARGV[4] actor   ARGV[5] size of the change log
-- Returns -1 when there is no such worker, 1 when that changed something, else 0.

local now, worker, drained = clock(ARGV[1]), ARGV[2], ARGV[3] == '1' and '1' or ''
if call('EXISTS', K.worker .. worker) == 0 then return -1 end
if (call('HGET', K.worker .. worker, 'drained') or '') == drained then return 0 end
call('HSET', K.worker .. worker, 'drained', drained)
if drained == '1' then
  call('HSET', K.worker .. worker, 'slots', '0')
  count_capacity()
end
log_change(now, ARGV[5], ARGV[4], drained == '1' and 'worker drained' or 'worker resumed', worker, '')
return 1
