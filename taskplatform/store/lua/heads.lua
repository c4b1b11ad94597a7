-- What is next in each broker queue, so that a worker can see whether it still lies there.
-- ARGV[1] now   ARGV[2…] queues
-- Returns for each queue a mark of its next message, '' where it is empty.

local now, heads = clock(ARGV[1]), {}
for i = 2, #ARGV do
  local queue = ARGV[i]
  local message = call('LINDEX', queue, -1)
  heads[#heads + 1] = message and redis.sha1hex(message) or ''
end
return heads
