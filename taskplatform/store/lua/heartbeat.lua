-- A worker lives: what it serves, and what it shall do.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] slots   ARGV[4] served priorities, comma-separated   ARGV[5] released jobs per slot
-- ARGV[6] 1: it was told to take nothing new, which is to hold also where this has forgotten it
-- ARGV[7…] by twos: further fields and their values
-- Returns first '1' if it shall take nothing new, else ''. Then the runs that the worker shall stop, until it says that it did (stopped):
-- by twos <job id>#<delivery>, and why.

local now, worker = clock(ARGV[1]), ARGV[2]
even_when_full()
call('ZADD', K.workers, text(now), worker)
local drained = ARGV[6] == '1' and '1' or ''
if call('EXISTS', K.worker .. worker) == 1 then drained = call('HGET', K.worker .. worker, 'drained') or '' end
call('HSET', K.worker .. worker, 'slots', drained == '1' and '0' or ARGV[3], 'queues', ARGV[4], 'buffer', ARGV[5], 'drained', drained,
  unpack(ARGV, 7))
count_capacity()
local answer = call('HGETALL', K.stops .. worker)
table.insert(answer, 1, drained)
return answer
