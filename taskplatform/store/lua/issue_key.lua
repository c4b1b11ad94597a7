-- Makes an API key, or the next one of a name, and forgets those that are past use and retention.
-- ARGV[1] now   ARGV[2] id   ARGV[3] name   ARGV[4] digest of its token   ARGV[5] scopes, '' those of the one before
-- ARGV[6] lifetime in ms ('' as long as that of the one before, or for ever)   ARGV[7] for how long in ms those before it, which must be, stay
-- valid ('' a new name)   ARGV[8] retention in ms   ARGV[9] most keys   ARGV[10] actor   ARGV[11] size of the audit log
-- Returns 1, also when it is asked for again; 0 when the name has a valid key or the id is taken, -1 when the name has no valid key to rotate, -2 when there are too many keys.

local now, id, name, scopes, lifetime, overlap = clock(ARGV[1]), ARGV[2], ARGV[3], ARGV[5], ARGV[6], ARGV[7]
-- The answer was lost, and this is sent again. Another one would end its own key with those before it, or find it in the way.
if call('HGET', K.api_key .. id, 'digest') == ARGV[4] then return 1 end
if call('EXISTS', K.api_key .. id) == 1 then return 0 end
local forgotten = now - tonumber(ARGV[8])
local valid, dead, newest, newest_made = {}, {}, nil, -1
for _, one in ipairs(call('ZRANGE', K.api_keys, 0, -1)) do
  local record = pairs_to_table(call('HGETALL', K.api_key .. one))
  local ends = tonumber(record.revoked or record.expires) or math.huge
  if ends <= forgotten then
    dead[#dead + 1] = one
  elseif record.name == name and ends > now then
    valid[#valid + 1] = { id = one, ends = ends }
    if tonumber(record.created) > newest_made then newest, newest_made = record, tonumber(record.created) end
  end
end
if overlap == '' and #valid > 0 then return 0 end
if overlap ~= '' and #valid == 0 then return -1 end
if call('ZCARD', K.api_keys) - #dead >= tonumber(ARGV[9]) then return -2 end

if scopes == '' then scopes = newest.scopes end
-- one that is ended by an earlier rotation has still the lifetime that it was made with
if lifetime == '' and newest then lifetime = newest.lifetime or '' end
call('HSET', K.api_key .. id, 'name', name, 'digest', ARGV[4], 'scopes', scopes, 'created', text(now), 'by', ARGV[10])
if lifetime ~= '' then call('HSET', K.api_key .. id, 'lifetime', lifetime, 'expires', text(now + tonumber(lifetime))) end
call('ZADD', K.api_keys, now, id)
for _, one in ipairs(valid) do
  local ends = now + tonumber(overlap)
  if ends < one.ends then call('HSET', K.api_key .. one.id, 'expires', text(ends)) end
end
for _, one in ipairs(dead) do
  call('DEL', K.api_key .. one)
  call('ZREM', K.api_keys, one)
end
audit(now, 'keys', ARGV[11], 'actor', ARGV[10], 'key', name, 'id', id, 'action', overlap == '' and 'key made' or 'key rotated', 'about', scopes)
return 1
