-- Begins a backfill: from now on the planner advances it. One that has begun stays as it is.
-- ARGV[1] now   ARGV[2] backfill   ARGV[3] definition   ARGV[4] and ARGV[5] its occurrences lie from then on, and before that
-- ARGV[6] jobs per second   ARGV[7] how many may be unfinished at a time   ARGV[8] for how many ms past jobs are known ('' any)
-- ARGV[9] how many users were given ('' all subscribers)   ARGV[10] how many of these are not subscribed
-- ARGV[11] how many occurrences there are, over all groups   ARGV[12] how many jobs that could be
-- ARGV[13] actor   ARGV[14] size of the change log   ARGV[15] how many backfills there may be that have not ended   ARGV[16] detail for the change log
-- Returns 1 when it began, 0 when it had, -1 when the definition is not published, -2 when there are too many.

local now, id, definition, actor = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[13]
local key = K.backfill .. id
if call('EXISTS', key) == 1 then return 0 end
if call('SISMEMBER', K.definitions, definition) == 0 then return -1 end
if call('ZCARD', K.backfills) - call('ZCARD', K.backfills_ended) >= tonumber(ARGV[15]) then return -2 end
call('HSET', key, 'definition', definition, 'since', ARGV[4], 'until', ARGV[5], 'rate', ARGV[6], 'most', ARGV[7], 'known', ARGV[8],
  'users', ARGV[9], 'unsubscribed', ARGV[10], 'occurrences', ARGV[11], 'total', ARGV[12], 'actor', actor, 'begun', text(now),
  'state', 'running', 'reason', '', 'cursor', '')
call('ZADD', K.backfills, text(now), id)
call('ZADD', K.due, text(now), 'b|' .. id)
-- the users were given an end, should this call never have come
if ARGV[9] ~= '' then call('EXPIRE', K.backfill_users .. id, 3153600000) end
log_change(now, ARGV[14], actor, 'backfill', definition, id .. ' begun, ' .. ARGV[16])
return 1
