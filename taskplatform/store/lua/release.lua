-- Moves due jobs from the waiting set to the broker's queues.
-- ARGV[1] now   ARGV[2] how many at most
-- Returns {released, milliseconds until the next may go ('' unknown), now}.

local now = clock(ARGV[1])
local released, next_at = release(now, tonumber(ARGV[2]))
return { released, next_at and text(math.max(0, math.ceil(next_at - now))) or '', text(now) }
