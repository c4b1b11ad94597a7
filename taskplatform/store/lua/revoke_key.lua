-- Revokes an API key for good: the one with an id, or all that a name has.
-- ARGV[1] now   ARGV[2] id or name   ARGV[3] actor   ARGV[4] size of the audit log
-- Returns how many were valid and are no more, or -1 when there is no such key.

local now, which = clock(ARGV[1]), ARGV[2]
even_when_full()
local known, revoked = false, 0
for _, id in ipairs(call('ZRANGE', K.api_keys, 0, -1)) do
  local record = pairs_to_table(call('HGETALL', K.api_key .. id))
  if id == which or record.name == which then
    known = true
    if (tonumber(record.revoked or record.expires) or math.huge) > now then
      revoked = revoked + 1
      call('HSET', K.api_key .. id, 'revoked', text(now))
      audit(now, 'keys', ARGV[4], 'actor', ARGV[3], 'key', record.name, 'id', id, 'action', 'key revoked')
    end
  end
end
return known and revoked or -1
