-- Keeps a message that no worker can take, for people to look at, and counts it.
-- ARGV[1] now   ARGV[2] queue   ARGV[3] reason   ARGV[4] worker   ARGV[5] the message or its beginning   ARGV[6] how many are kept
-- Returns 1.

local now = clock(ARGV[1])
call('XADD', K.garbage, 'MAXLEN', ARGV[6], '*', 'at', text(now), 'queue', ARGV[2], 'reason', ARGV[3], 'worker', ARGV[4], 'text', ARGV[5])
count('garbage')
return 1
