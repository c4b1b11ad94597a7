-- A connection to a server was made. One that restarted, or a replica that took over, may not know the last calls: the buckets
-- of all rates start empty on it.
-- ARGV[1] now   ARGV[2] the server's run id
-- Returns 1 when the server is another than before, else 0.

local now = clock(ARGV[1])
if call('GET', K.server) == ARGV[2] then return 0 end
even_when_full()
call('SET', K.server, ARGV[2])
for _, name in ipairs(call('HKEYS', K.limits)) do
  local limit = limit_of(name)
  if limit.rate then
    local bucket = bucket_of(name, limit, now)
    bucket.level = math.min(0, bucket.level)
    keep_bucket(name, bucket, now)
  end
end
return 1
