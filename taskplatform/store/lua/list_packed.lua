-- Lists the jobs of a user that are packed, and so not in the user's index.
-- ARGV[1] now   ARGV[2] user
-- Returns by twos job ids and when they were made.

local _, user = clock(ARGV[1]), ARGV[2]
local found = {}
for _, definition in ipairs(call('HKEYS', K.user .. user)) do
  for _, id in ipairs(packed_jobs(user, definition)) do
    found[#found + 1] = id
    found[#found + 1] = load_packed(id).made
  end
end
return found
