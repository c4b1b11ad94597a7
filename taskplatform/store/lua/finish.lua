-- Ends a delivery's run: completed, failed, timed_out, canceled or retrying. Then releases what there is room for.
-- ARGV[1] now   ARGV[2] job id   ARGV[3] delivery   ARGV[4] worker   ARGV[5] new state   ARGV[6] reason
-- ARGV[7] detail as JSON or ''   ARGV[8] wait before the retry in ms   ARGV[9] what its call says of the host: 'good', 'bad' or '' nothing
-- ARGV[10] for how many ms the host asks not to be called, 0: it does not   ARGV[11] the rule of its breaker, see `report_call`
-- ARGV[12] the host that it called ('' none)   ARGV[13] 1: a time limit ended it
-- Returns {'done', what became of the host, in words, or ''}, or instead of 'done' the job's state when this delivery no longer counts (its
-- result is then only noted), or 'unknown'.

local now, id, delivery, worker, to = clock(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
local job = load_job(id)
if not job then return { 'unknown', '' } end
-- one that is sent again, because its answer was lost, is answered as the first time
local mark = string.sub(redis.sha1hex(table.concat({ delivery, worker, to, ARGV[6], ARGV[7], ARGV[8] }, '\0')), 1, 16)
if job.mark == mark then return { 'done', '' } end
even_when_full()
if not is_run(job, delivery, worker) then
  if add_note(id, now, job, worker, 'discarded the result of delivery ' .. delivery .. ': ' .. to .. ', ' .. ARGV[6], ARGV[7]) then count('discarded') end
  return { job.state, '' }
end
local said = report_call(id, job, ARGV[12], ARGV[9], tonumber(ARGV[10]), ARGV[11], ARGV[6], now)
local definition, priority = parts(id), job.priority
if to == 'retrying' then
  give_back(id, job, 'retrying', now, now + tonumber(ARGV[8]), worker, ARGV[6], ARGV[7])
else
  conclude(id, job, to, now, worker, ARGV[6], ARGV[7], true)
end
call('HSET', K.job .. id, 'mark', mark)
observe_run(definition, priority .. '|' .. to .. (to == 'retrying' and ARGV[13] == '1' and '|late' or ''), job.started, now)
release(now, 10)
return { 'done', said }
