-- Puts back what was set aside for the cap of users who have room by now.
-- ARGV[1] now   ARGV[2] how many jobs at the most
-- Returns how many.

local now, most, back = clock(ARGV[1]), tonumber(ARGV[2]), 0
for _, user in ipairs(call('SMEMBERS', K.capped_users)) do
  if back >= most then break end
  back = back + uncap(user, most - back, now)
end
if back > 0 then release(now, 100) end
return back
