-- A worker lives: what it serves, and what it shall stop.
-- ARGV[1] now   ARGV[2] worker   ARGV[3] slots   ARGV[4] served priorities, comma-separated   ARGV[5] released jobs per slot
-- ARGV[6…] by twos: further fields and their values
-- Returns the runs that the worker shall stop, until it says that it did (stopped): by twos <job id>#<delivery>, and why.

local now, worker = clock(ARGV[1]), ARGV[2]
even_when_full()
call('ZADD', K.workers, text(now), worker)
call('HSET', K.worker .. worker, 'slots', ARGV[3], 'queues', ARGV[4], 'buffer', ARGV[5], unpack(ARGV, 6))
count_capacity()
return call('HGETALL', K.stops .. worker)
