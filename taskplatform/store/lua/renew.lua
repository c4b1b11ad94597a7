-- A run that was held up between its start and its call asks whether it may still make it: its token was for the time of its start.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker
-- ARGV[5] how often a run of the job may be given back, before it fails
-- ARGV[6] a mark of this call: one that is sent again, because its answer was lost, takes no second token
-- Returns 'go', 'free' (no rate binds it, there is no need to ask), 'given back' (to its old place), or the job's state when this
-- delivery no longer counts, or 'unknown'.

local now, id, delivery, worker = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local job = load_job(id)
if not job then return 'unknown' end
if not is_run(job, delivery, worker) then return job.state end
if job.mark == ARGV[6] then return 'go' end
local kept = kept_from_host(id, delivery, now)
if kept then
  even_when_full()
  give_back(id, job, 'retrying', now, tonumber(job.after), worker, 'held up before its call, and ' .. kept, '')
  call('HSET', K.job .. id, 'budget', tonumber(job.budget or '0') + 1)
  release(now, 10)
  return 'given back'
end
local definition = parts(id)
if not next(rates(definition)) then return 'free' end
-- it goes before what is released and has not started, because it took a token at its start
if have_tokens(definition, now) then
  each_bucket(definition, now, function(bucket) bucket.level = bucket.level - bucket.cost end)
  call('HSET', K.job .. id, 'mark', ARGV[6])
  return 'go'
end
even_when_full()
local budget = tonumber(job.budget or '0')
if budget >= tonumber(ARGV[5]) then
  conclude(id, job, 'failed', now, worker, 'held up before its call again and again, and its place in the limit has passed', '')
else
  give_back(id, job, 'retrying', now, tonumber(job.after), worker, 'held up before its call, and its place in the limit has passed', '')
  -- the run that was broken off does not use up the job's budget
  call('HSET', K.job .. id, 'budget', budget + 1)
end
release(now, 10)
return 'given back'
